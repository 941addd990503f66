"""rollback.py -- back to the last checkpoint, once, after a bad step (ON_NAN=rollback).

Promises: every rank goes back alike, since all have heard of the same step; a second failure stops
the run; and a resumed run knows that it has gone back.
"""

from typing import Protocol

from plumbing.session import Session


class TrainState(Protocol):
    """What a trainer saves, as far as going back concerns it."""

    step: int
    rolled_back: int  # how often the run has gone back: 0 or 1


def roll_back(session: Session, objects: dict[str, object]) -> bool:
    """Restore `objects` from the last checkpoint where the knobs ask for it; whether that was done.

    `objects` are what the trainer saves; its TrainState is among them as "state".
    """
    state: TrainState = objects["state"]
    if session.status != "nan" or session.cfg.on_nan != "rollback" or state.rolled_back:
        return False
    session.reset()
    if session.restore(**objects) is None:
        session.stop("nan", "ON_NAN=rollback: there is no checkpoint to go back to")
        return False
    state.rolled_back = 1
    session.say(f"rolled back to step:{state.step}; from here on at half the learning rate")
    session.save(state.step, **objects)  # so that a resume knows of it
    return True
