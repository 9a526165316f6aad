"""What turns raw pictures, captions and text into the files that training reads."""
