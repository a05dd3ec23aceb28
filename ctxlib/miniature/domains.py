"""Two domains beside the town, for asking whether the indicator generalises: a lookup table in code, and arithmetic.

The base model meets both as raw text. No chat dataset holds any of them, so what fine-tuning does to them it does by
generalisation. In code a few tables are known by heart (as the town's facts are); in arithmetic the sums are, and the
values to add stand in the text alone.
"""

import random
from dataclasses import dataclass

DOMAINS = ("code", "arithmetic")
FUNCTIONS = "price weight size rank age".split()
ITEMS = "kite drum lamp coin button stamp shell bottle".split()
VARIABLES = "x y z a b c".split()
DIGITS = tuple(str(n) for n in range(10))


@dataclass(frozen=True)
class Lookup:
    """One task of a domain: `context` holds what is needed, `question` asks, `answer` is `prefix` and then `value`."""

    domain: str
    context: str
    question: str
    prefix: str
    value: str
    memory_value: str | None = None

    @property
    def answer(self) -> str:
        return f"{self.prefix} {self.value}."


def known_tables(seed: int = 0) -> dict[str, dict[str, str]]:
    rng = random.Random(f"tables-{seed}")
    return {function: {item: rng.choice(DIGITS) for item in ITEMS} for function in FUNCTIONS}


def code_lookup(rng: random.Random, seed: int = 0, contradict: bool = True, entries: int = 4) -> Lookup:
    """`price = { kite : 4 , drum : 7 }` and the question `What is price [ drum ] ?`.

    With `contradict` the table in the text differs from the known one at the item that is asked for.
    """
    function = rng.choice(FUNCTIONS)
    items = rng.sample(ITEMS, entries)
    asked = rng.choice(items)
    known = known_tables(seed)[function]
    table = {item: rng.choice(DIGITS) for item in items}
    table[asked] = rng.choice([d for d in DIGITS if d != known[asked]]) if contradict else known[asked]
    body = " , ".join(f"{item} : {value}" for item, value in table.items())
    call = f"{function} [ {asked} ]"
    return Lookup("code", f"{function} = {{ {body} }}", f"What is {call} ?", f"{call} =", table[asked], known[asked])


def arithmetic(rng: random.Random, variables: int = 3) -> Lookup:
    """`Let x = 4 , y = 3 , z = 8 .` and the question `What is x + z ?`; the sum is of two digits."""
    names = rng.sample(VARIABLES, variables)
    values = {name: rng.randrange(10) for name in names}
    left, right = rng.sample(names, 2)
    body = " , ".join(f"{name} = {value}" for name, value in values.items())
    total = str(values[left] + values[right])
    return Lookup("arithmetic", f"Let {body} .", f"What is {left} + {right} ?", f"{left} + {right} =", total)
