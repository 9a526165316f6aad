"""A server, asked by the client of OpenAI."""

import requests


def test_health_models_and_metrics(address, client):
    assert requests.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["small"]
    assert "megafusion_waiting" in requests.get(f"{address}/metrics", timeout=5).text
