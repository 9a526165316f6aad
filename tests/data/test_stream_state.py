"""The state of a data loader keeps the form that checkpoints of earlier versions have."""

from tests.support.rows import digest, stream_of, write_pairs, write_texts

SAVED = {
    "format": 2,
    "batch_number": 7,
    "streams": {
        "0": {
            "position": {"pairs": [0, 19, 0], "text": [0, 4, 64]},
            "positions_packed": {"pairs": 216, "text": 226},
            "pending": [["pairs", 0, 17, 0, 13, 1], ["pairs", 0, 18, 0, 13, 1], ["text", 0, 4, 10, 64, 0]],
            "num_read": 24,
            "skipped": {},
        }
    },
}
"""After 7 batches, as saved when pending documents were lists."""


def test_a_state_of_an_earlier_version_is_the_same_and_resumes(tmp_path):
    sources = {
        "pairs": (write_pairs(tmp_path / "pairs", 30), 0.5),
        "text": (write_texts(tmp_path / "text", 20), 0.5),
    }
    whole, resumed = (stream_of(sources, range(1), 1, packing_buffer_size=3) for _ in range(2))
    for _ in range(7):
        whole.next()
    assert whole.state_dict() == SAVED
    resumed.load_state_dict(SAVED)
    assert [digest(resumed.next()) for _ in range(9)] == [digest(whole.next()) for _ in range(9)]
