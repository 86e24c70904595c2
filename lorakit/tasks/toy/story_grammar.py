"""A story follows one object: who holds it and where, so each sentence is better guessed from those before it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.tasks import toy

WORDS = toy.WORDS["stories"]
PEOPLE = WORDS["people"]  # name -> pronoun


@dataclass
class Scene:
    """The state of the story's world."""

    holder: str
    other: str
    color: str
    thing: str
    place: str

    @property
    def treasure(self) -> str:
        return f"the {self.color} {self.thing}"


def move(scene: Scene, rng: random.Random) -> str:
    """The holder takes the object elsewhere."""
    scene.place = rng.choice([place for place in WORDS["places"] if place != scene.place])
    return f"{PEOPLE[scene.holder].capitalize()} took it to the {scene.place}."


def give(scene: Scene, rng: random.Random) -> str:
    """The object changes hands."""
    giver, scene.holder, scene.other = scene.holder, scene.other, scene.holder
    return f"{giver} gave {scene.treasure} to {scene.holder}."


def rest(scene: Scene, rng: random.Random) -> str:
    """Nothing changes; what was said is said again."""
    return f"{scene.holder} liked the {scene.thing}'s {scene.color} color in the {scene.place}."


Event = Callable[[Scene, random.Random], str]
EVENTS: tuple[Event, ...] = (move, give, rest)


def story(rng: random.Random, events: Sequence[Event]) -> str:
    """3 to 6 sentences, up to 3 of them events; the last one follows from the others."""
    holder, other = rng.sample(list(PEOPLE), 2)
    scene = Scene(holder, other, rng.choice(WORDS["colors"]), rng.choice(WORDS["things"]), rng.choice(WORDS["places"]))
    sentences = [f"{holder} and {other} found a {scene.color} {scene.thing} in the {scene.place}."]
    sentences.append(f"{holder} kept {scene.treasure}.")
    sentences += [rng.choice(events)(scene, rng) for _ in range(rng.randrange(4))]
    return " ".join([*sentences, f"Now {scene.holder} has {scene.treasure} in the {scene.place}."])
