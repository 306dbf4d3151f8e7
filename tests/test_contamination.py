import random
import tracemalloc

from llmtune.evaluate import contamination

LONG = (
    "A farmer has seventeen sheep and all but nine of them run away through a hole in the fence; "
    "how many sheep does the farmer still have in the evening when he counts them again?"
)
MIDDLE = "Which river flows through the city of Novi Sad?"
SHORT = "Say hello."
ITEMS = {"long": LONG, "middle": MIDDLE, "short": SHORT, "empty": "?!"}


def found(*rows):
    return contamination.find(ITEMS, ((f"train.jsonl:{line}", texts) for line, texts in enumerate(rows, 1)))


def test_a_planted_item_is_named_with_its_place():
    assert found(["Hello there."], [LONG, "Nine."], [LONG]) == {"long": "stands in train.jsonl:2"}


def test_case_punctuation_and_white_space_do_not_matter():
    assert found([f"Tell me:\n\n{MIDDLE.upper().replace(' ', '  ').rstrip('?')} — please"]) == {
        "middle": "stands in train.jsonl:1"
    }


def test_a_near_duplicate_is_found_and_a_rewording_is_not():
    near = LONG.replace("seventeen sheep", "18 sheep").replace("the evening", "the morning")
    assert found([near]) == {"long": "13 words in a row of it stand in train.jsonl:1"}
    reworded = (
        "Seventeen sheep belong to a farmer. Nine stay when the others escape by the fence. How many are left at night?"
    )
    assert found([reworded], ["What is the river that flows in Novi Sad?"]) == {}


def test_twelve_words_of_a_long_item_are_not_enough():
    twelve = " ".join(LONG.split()[4:16])
    assert found([twelve], [f"{twelve} back"]) == {}
    assert found([" ".join(LONG.split()[4:17])]) == {"long": "13 words in a row of it stand in train.jsonl:1"}


def test_a_short_item_must_be_a_whole_turn():
    assert found(["Now say hello to her."]) == {}
    assert found(["Hi", "say Hello"]) == {"short": "stands in train.jsonl:1"}


def test_words_do_not_run_on_from_turn_to_turn():
    half = len(LONG) // 2
    assert found([LONG[:half], LONG[half:]]) == {"long": "13 words in a row of it stand in train.jsonl:1"}
    middle = MIDDLE.split()
    assert found([" ".join(middle[:5]), " ".join(middle[5:])]) == {}


def test_a_form_of_words_makes_no_item_known_but_a_planted_one_in_many_rows_is():
    form = "Write one short sentence for the function below that says what it does to a reader in a hurry:"
    items = {f"item-{i}": f"{form} alpha{i} beta{i} gamma{i}" for i in range(30)}
    rows = [(f"train.jsonl:{i}", [f"{form} alpha{i} delta{i}"]) for i in range(5)]
    assert contamination.find(items, rows) == {}
    few = dict(list(items.items())[:5])
    frequent = [(f"train.jsonl:{i}", [f"{form} delta{i}"]) for i in range(11)]
    assert contamination.find(few, frequent) == {}
    planted = [(f"train.jsonl:{i}", [items["item-3"]]) for i in range(40)]
    assert contamination.find(items, planted)["item-3"] == "stands in train.jsonl:0"


def test_signs_without_spaces_are_words():
    text = "東京は日本の首都であり世界最大級の都市です"
    rows = [("train.jsonl:1", [f"質問。{text}。"])]
    assert contamination.find({"tokyo": text}, rows) == {"tokyo": "stands in train.jsonl:1"}


def test_two_hundred_thousand_rows_in_seconds_and_within_bounded_memory():
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(2_000)]  # all of them stand in the items: the slowest case
    items = {f"item-{i}": " ".join(rng.choices(vocabulary, k=40)) for i in range(500)}

    texts = [" ".join(rng.choices(vocabulary, k=20)) for _ in range(5_000)]

    def rows():
        for line in range(200_000):
            yield f"train.jsonl:{line}", [items["item-7"] if line == 123_456 else texts[line % len(texts)]]

    assert contamination.find(items, rows()) == {"item-7": "stands in train.jsonl:123456"}
    tracemalloc.start()
    contamination.find(items, (row for _, row in zip(range(300), rows(), strict=False)))
    first = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    contamination.find(items, (row for _, row in zip(range(3_000), rows(), strict=False)))
    assert tracemalloc.get_traced_memory()[1] < 1.2 * first
    tracemalloc.stop()
