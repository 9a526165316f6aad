"""A page of a server with other limits: in a file of its own, gradio has one folder of uploads a process."""

import pytest
from gradio_client import Client

from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.page.mount import mount_page
from tests.serve.test_page import ask
from tests.support.serving import running


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 3}, "seed 7"),  # of the model's own 4, and an empty field is as many as are allowed
        ({"timeout_seconds": 0.01}, "Not answered within timeout_seconds 0.01"),
    ],
)
def test_the_page_keeps_the_servers_limits(pipeline, limits, said):
    app = mount_page(make_app(pipeline, ServeConfig(**limits), "small", []), "small", ["red apple"], [])
    with running(app) as address:
        client = Client(address, verbose=False)
        shown, statuses = ask(client, "draw", "red apple", 1, num_inference_steps=None)
        client.close()
    assert said in f"{shown} {statuses[-1]}"
