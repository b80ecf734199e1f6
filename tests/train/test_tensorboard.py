"""The event file that TensorBoard reads: every value of the curve at its step, one file however often it is written."""

from __future__ import annotations

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from cbtm_ray.train.tensorboard import write_events

CURVE = [
    {"step": 2, "tokens": 100, "loss_nats": 3.5, "learning_rate": 0.1, "tokens_per_s": 50.0, "mfu": None},
    {"step": 4, "tokens": 200, "loss_nats": 2.5, "learning_rate": 0.0, "tokens_per_s": 25.0, "mfu": 0.5,
     "valid_loss_nats": 2.75},
]  # fmt: skip


def records(content: bytes) -> list[Event]:
    """TFRecord by its format: length in 8 bytes, 4 of its checksum, the event, 4 of its own."""
    events, at = [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        events.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return events


def test_a_curve_comes_back_value_by_value(tmp_path: Path) -> None:
    write_events(CURVE[:1], f"file://{tmp_path}/dense")
    write_events(CURVE, f"file://{tmp_path}/dense")
    (path,) = (tmp_path / "dense").iterdir()
    assert ".tfevents." in path.name
    found = {
        (value.tag, event.step): (round(value.simple_value, 4), event.wall_time)
        for event in records(path.read_bytes())
        for value in event.summary.value
    }
    assert found == {
        ("loss_nats", 2): (3.5, 2.0),
        ("learning_rate", 2): (0.1, 2.0),
        ("tokens_per_s", 2): (50.0, 2.0),
        ("loss_nats", 4): (2.5, 6.0),
        ("learning_rate", 4): (0.0, 6.0),
        ("tokens_per_s", 4): (25.0, 6.0),
        ("mfu", 4): (0.5, 6.0),
        ("valid_loss_nats", 4): (2.75, 6.0),
    }
