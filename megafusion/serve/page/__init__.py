"""The page of a server: chat, draw, describe and edit in a browser, with gradio."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing leaves this machine
