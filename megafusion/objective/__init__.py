"""The two losses, and the noise schedule that one of them needs."""
