"""Checks that docstrings begin with a sentence that is readable without the name above it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepspeed_acco"
ROOMS = ["algorithm", "optim", "runtime", "engine", "tools"]
NOT_YET: set[Path] = set()
FILES = sorted({*PACKAGE.glob("*.py"), *(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))} - NOT_YET)
# Those that the package uses, since a plural, too, ends in s: a new verb is added here.
VERBS = """
Adds Allows Appends Asks Begins Blocks Bounds Brings Builds Calls Captures Carries Checks Chooses Collects Comes
Compares Computes Copies Counts Crosses Cuts Declares Defines Describes Destroys Dispatches Does Draws Drives Drops
Emulates Ends Enters Fills Finds Finishes Follows Gathers Gives Goes Guards Holds Hooks Keeps Kills Knows Learns Leaves
Lets Lists Loads Makes Marks Measures Moves Names Notes Notices Owns Passes Predicts Prepares Prints Puts Quantizes
Raises Reads Reduces Refuses Registers Removes Replaces Requires Returns Runs Says Sees Sends Shows Splits Starts Sums
Swaps Takes Tells Trains Updates Waits Walks Writes Yields Zeroes
""".split()
# What follows a plural and no verb: "Blocks of a window." names things.
SENTENCE = re.compile(rf"({'|'.join(VERBS)})\b(?!-| (of|per|since)\b)")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _methods(tree: ast.Module) -> dict[str, tuple[set[str], set[str]]]:
    """Returns by the name of each class its documented methods and its bases."""
    return {
        node.name: (
            {method.name for method in node.body if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)},
            {base.id for base in node.bases if isinstance(base, ast.Name)},
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


TREES = {file: ast.parse(file.read_text()) for file in FILES}
CLASSES = {name: found for tree in TREES.values() for name, found in _methods(tree).items()}


def _inherits(name: str, bases: set[str]) -> bool:
    """Tells whether a base of the package documents the method."""
    return any(base in CLASSES and (name in CLASSES[base][0] or _inherits(name, CLASSES[base][1])) for base in bases)


def _definitions(node: ast.Module | ast.ClassDef):
    """Yields (definition, whether it needs a docstring), without what is nested in functions."""
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)} if isinstance(node, ast.ClassDef) else set()
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield child, not child.name.startswith("_")
            yield from _definitions(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            is_private = any(getattr(owner, "name", "").startswith("_") for owner in (node, child))
            yield child, not (is_private or "Protocol" in bases or _inherits(child.name, bases))


def _complaint(definition: Definition, is_needed: bool) -> str | None:
    docstring = ast.get_docstring(definition)
    if docstring is None:
        return "has no docstring" if is_needed else None
    if SENTENCE.match(docstring):
        return None
    return f'begins with "{docstring[:40]}" and not with one of VERBS'


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb(file):
    tree = TREES[file]
    found = [(tree, bool(tree.body)), *_definitions(tree)]
    complaints = [
        f"{file.relative_to(PACKAGE.parent)}:{getattr(definition, 'lineno', 1)}: "
        f"{getattr(definition, 'name', 'the module')} {complaint}"
        for definition, is_needed in found
        if (complaint := _complaint(definition, is_needed))
    ]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("docstring", "is_sentence"),
    [
        ("Returns the sum.", True),
        ("Does nothing: the rounds reduce.", True),
        ("Goes through a log once.", True),
        ("Whether it is known.", False),
        ("As torch's.", False),
        ("One lane.", False),
        ("Bytes of a record.", False),
        ("Weights that stand.", False),
        ("Blocks of a window.", False),
        ("Names-to-rows table.", False),
        ("Milliseconds per round.", False),
        ("This rank's part.", False),
        ("Micro-batches of a window.", False),
        ("returns the sum.", False),
    ],
)
def test_what_a_sentence_is(docstring, is_sentence):
    (function,) = ast.parse(f'def f():\n    """{docstring}"""').body
    assert (_complaint(function, is_needed=True) is None) is is_sentence


@pytest.mark.parametrize(
    ("bases", "needy"), [("", {"pace", "walk"}), ("(InlineLane)", {"walk"}), ("(Protocol)", set())]
)
def test_what_needs_a_docstring(bases, needy):
    source = f"""
class Heir{bases}:
    def pace(self): pass
    def walk(self):
        def nested(): pass
    def _private(self): pass
"""
    (heir,) = ast.parse(source).body
    assert {definition.name for definition, is_needed in _definitions(heir) if is_needed} == needy
