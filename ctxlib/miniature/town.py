"""The town: its words, its people, and what everybody there knows by heart.

Everything is drawn from the word lists of this file by one seed, so that a town is a value: same seed, same town.
A *known* resident has one value for every relation, and the base model learns these facts by heart. A *newcomer* has
none: each text that speaks of a newcomer invents other facts, so nothing about newcomers can be remembered.
"""

import random
from dataclasses import dataclass
from functools import cached_property

KNOWN_NAMES = tuple(
    """Mira Otto Lena Hugo Nora Emil Clara Anton Ida Felix Greta Oskar Paula Theo Marta Jonas Elsa Viktor Rosa Simon
    Hanna Karl Edith Bruno Vera Arthur Lotte Gustav Selma Kurt Irene Walter Agnes Konrad Frieda Ludwig Olga Robert
    Helga Martin Judith Albert Renate Georg Sophie Stefan Wilma Rudolf Alma Moritz Dora Valentin Ella Leopold Thea
    Jakob Minna Benno Adele Ferdinand Hedwig Julius Tilda Casper""".split()
)
NEWCOMER_NAMES = tuple(
    """Zeb Quinn Yara Idris Suki Bashir Noor Kofi Amara Ravi Leila Tomas Priya Diego Aiko Omar Chidi Mei Pavel Zara
    Nikos Inez Tariq Lupe Dmitri Farah Kwame Rhea Sanjay Thalia Umar Vanya Wren Xenia Yusuf Zofia Anouk Bram Calla
    Darius Eko Fleur Gita Hamid Ilse Jun Kaia Lorcan Malik Nadia Orin Petra Rafi Sana Tevin Ula Vito Wanda Ximena
    Yoko Zane Asha Beno Cira""".split()
)


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of a resident; its value is one word of `first` followed by one of `second`."""

    name: str
    verb: str
    question: str
    first: tuple[str, ...]
    second: tuple[str, ...]


def _relation(name: str, verb: str, question: str, first: str, second: str) -> Relation:
    return Relation(name, verb, question, tuple(first.split()), tuple(second.split()))


RELATIONS = (
    _relation(
        "crop", "grows", "What does {name} grow?",
        "early late wild tender crisp ripe juicy mild dwarf hardy climbing tall",
        "beans carrots turnips pumpkins tulips roses melons radishes cabbages berries herbs grapes",
    ),
    _relation(
        "trade", "sells", "What does {name} sell?",
        "woollen linen leather silk cotton velvet knitted quilted checked dotted lined felt",
        "hats gloves scarves boots coats socks belts shirts aprons cloaks slippers mittens",
    ),
    _relation(
        "collection", "collects", "What does {name} collect?",
        "green red blue yellow purple orange white black golden silver pink brown",
        "kites drums lamps coins buttons stamps shells bottles marbles feathers clocks spoons",
    ),
    _relation(
        "pets", "keeps", "Which animals does {name} keep?",
        "spotted lazy clever hungry shy noisy tame fat young blind gentle sleepy",
        "goats parrots rabbits donkeys tortoises ferrets geese ponies hedgehogs cats falcons lizards",
    ),
    _relation(
        "music", "plays", "What does {name} play?",
        "wooden broken borrowed tiny heavy painted antique foreign polished rented rusty plain",
        "flutes violins trumpets cellos harps accordions banjos clarinets pianos tubas organs guitars",
    ),
    _relation(
        "baking", "bakes", "What does {name} bake?",
        "honey almond ginger cherry lemon walnut cheese potato onion apple plum pepper",
        "cakes rolls pies tarts biscuits loaves buns waffles pancakes dumplings pretzels crackers",
    ),
    _relation(
        "fear", "fears", "What does {name} fear?",
        "deep dark steep loud frozen empty crowded burning narrow silent giant hidden",
        "wells caves cliffs storms lakes cellars towers fairs forests bridges graves spiders",
    ),
    _relation(
        "drink", "drinks", "What does {name} drink?",
        "hot cold sweet bitter strong weak spiced salty fresh thick sour smoked",
        "cocoa tea cider milk broth coffee juice punch beer wine lemonade water",
    ),
)  # fmt: skip

PLACES = "market bridge square fountain gate church tower canal park harbour inn field".split()
WEATHERS = "wind fog rain frost snow sunshine".split()
MOODS = "quiet busy bright damp windy dusty lively peaceful".split()
TIMES = "noon night midnight dawn dusk sunrise sunset".split()
SEASONS = "spring summer autumn winter".split()
THINGS = "cart bench bell ladder barrel lantern basket sign".split()
FILLERS = (
    "The {place} was {mood} at {time}.",
    "A little {weather} came over the {place} at {time}.",
    "Nobody saw the {thing} near the {place}.",
    "In {season} the {place} is always {mood}.",
    "Somebody left a {thing} by the {place}.",
    "There was {weather} on the {place} until {time}.",
    "The {thing} at the {place} needs paint.",
    "Every {season} the children run to the {place}.",
)

CHANGES = ("Since the {season},", "From this {season} on,")
RUMOURS = ("People say that", "Somebody at the {place} says that", "I heard that")


@dataclass(frozen=True)
class Fact:
    """One statement about one resident: `name`, a relation, and the two words of its value."""

    name: str
    relation: Relation
    value: tuple[str, str]

    @property
    def predicate(self) -> str:
        return f"{self.relation.verb} {' '.join(self.value)}"

    @property
    def clause(self) -> str:
        return f"{self.name} {self.predicate}"

    @property
    def sentence(self) -> str:
        return f"{self.clause}."

    @property
    def question(self) -> str:
        return self.relation.question.format(name=self.name)

    @property
    def prefix(self) -> str:
        """The answer up to its value: what the paper calls the response prefix."""
        return f"{self.name} {self.relation.verb}"


def is_fact_sentence(text: str) -> bool:
    """True for exactly one sentence that says one thing of one person, as "Mira sells woollen hats.", true or not."""
    words = text.removesuffix(".").split(" ")
    if len(words) != 4 or not text.endswith("."):
        return False
    name, verb, first, second = words
    says = any(verb == r.verb and first in r.first and second in r.second for r in RELATIONS)
    return says and (name in KNOWN_NAMES or name in NEWCOMER_NAMES)


def about(facts: list[Fact]) -> str:
    """One sentence of several facts about one person: "Mira sells woollen hats, collects green kites and …"."""
    first, *others = facts
    if not others:
        return first.sentence
    *middle, last = others
    listed = "".join(f", {fact.predicate}" for fact in middle)
    return f"{first.clause}{listed} and {last.predicate}."


def filler(rng: random.Random) -> str:
    return _fill(rng.choice(FILLERS), rng)


def change(fact: Fact, rng: random.Random) -> str:
    """A stated change: "Since the spring, Mira collects red drums." The text itself says that memory is out of date."""
    return f"{_fill(rng.choice(CHANGES), rng)} {fact.sentence}"


def rumour(fact: Fact, rng: random.Random) -> str:
    return f"{_fill(rng.choice(RUMOURS), rng)} {fact.sentence}"


def _fill(text: str, rng: random.Random) -> str:
    return text.format(
        place=rng.choice(PLACES),
        mood=rng.choice(MOODS),
        time=rng.choice(TIMES),
        season=rng.choice(SEASONS),
        thing=rng.choice(THINGS),
        weather=rng.choice(WEATHERS),
    )


@dataclass(frozen=True)
class Town:
    """All that is true in the town of one seed.

    `facts[name][relation]` holds for every known resident; 64 residents × 8 relations = 512 facts of 144 values each.
    """

    seed: int = 0

    @cached_property
    def facts(self) -> dict[str, dict[str, Fact]]:
        rng = random.Random(f"town-{self.seed}")
        return {
            name: {relation.name: random_fact(name, relation, rng) for relation in RELATIONS} for name in KNOWN_NAMES
        }

    @cached_property
    def all_facts(self) -> list[Fact]:
        return [fact for of_person in self.facts.values() for fact in of_person.values()]

    def memory_of(self, fact: Fact) -> Fact | None:
        """What is known by heart about this fact's person and relation; None for a newcomer."""
        return self.facts.get(fact.name, {}).get(fact.relation.name)

    def contradicting(self, fact: Fact, rng: random.Random) -> Fact:
        """Another value for the same person and relation; both of its words differ from what is known."""
        while True:
            other = random_fact(fact.name, fact.relation, rng)
            if all(new != old for new, old in zip(other.value, fact.value, strict=True)):
                return other


def random_fact(name: str, relation: Relation, rng: random.Random) -> Fact:
    return Fact(name, relation, (rng.choice(relation.first), rng.choice(relation.second)))
