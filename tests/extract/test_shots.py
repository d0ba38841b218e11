import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from relish.cache.errors import BackboneError, DataError
from relish.extract.backbone import Backbone
from relish.extract.candidates import candidate_scores, format_score
from relish.extract.chat import chat_border
from relish.extract.files import find_backbone
from relish.extract.generator import NEW_TOKENS
from relish.extract.rows import SplitData
from relish.extract.shots import Example, Prompts, choose_examples
from relish.extract.start import common_prefix

EXAMPLES = [Example("one:", "1"), Example("two\n", "2.5"), Example("three:", "3")]
RANGE = (0.0, 5.0)


@pytest.fixture
def backbone(tiny_model):
    files = find_backbone(tiny_model("llama"), gguf_file=None, revision=None)
    return Backbone(files, layers=(), compute_dtype="float32", device="cpu", trust_remote_code=False)


def train(targets):
    texts = [f"text {number}:" for number in range(len(targets))]
    return SplitData([str(n) for n in range(len(targets))], texts, np.array(targets, dtype=np.float64))


def test_examples_are_labelled_rows_drawn_once_and_fewer_are_the_first_of_more():
    split = train([np.nan if row % 3 == 0 else row / 20 for row in range(90)])
    many = choose_examples(split, 40, RANGE)
    assert choose_examples(split, 8, RANGE) == many[:8]
    rows = [int(example.text.split()[1].rstrip(":")) for example in many]
    assert len(set(rows)) == 40
    assert all(row % 3 for row in rows)
    assert rows != sorted(rows)
    assert [example.answer for example in many] == [f"{row / 20:.1f}".removesuffix(".0") for row in rows]
    assert len(choose_examples(split, 200, RANGE)) == 60
    assert choose_examples(None, 0, RANGE) == []


def test_examples_without_a_training_split_or_labels_are_refused():
    with pytest.raises(DataError, match="--shots 8 takes its examples from a split called train, which was not given"):
        choose_examples(None, 8, RANGE)
    with pytest.raises(DataError, match="no row of the split train has a label, so it has no examples for --shots 8"):
        choose_examples(train([np.nan]), 8, RANGE)


def test_a_prompt_is_examples_answers_and_blank_lines(backbone):
    prompts = Prompts(backbone, EXAMPLES, chat_template=False)
    assert prompts.text("row:", 0) == "row:"
    assert prompts.text("row:", 2) == "one: 1\n\ntwo\n2.5\n\nrow:"
    assert prompts.border(0) == {"lead": None, "end": "\n"}
    assert prompts.border(2) == {"lead": None, "end": "\n\n"}
    (tokens,) = prompts.tokens(["row:"], 2)
    assert tokens.tolist() == backbone.tokenizer("one: 1\n\ntwo\n2.5\n\nrow:")["input_ids"]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_candidates_have_the_tokens_that_answers_have_among_the_examples(tiny_model, arch):
    files = find_backbone(tiny_model(arch), gguf_file=None, revision=None)
    backbone = Backbone(files, layers=(), compute_dtype="float32", device="cpu", trust_remote_code=False)
    scores = candidate_scores(RANGE)
    for score in scores:
        answer = format_score(score, RANGE)
        prompts = Prompts(backbone, [Example("Rate: a film\nScore:", answer)], chat_template=False)
        candidate = prompts.candidates("Rate: {text}\nScore:", scores, RANGE, 1)[scores.index(score)].tolist()
        (whole,) = prompts.tokens(["Rate: a play\nScore:"], 1)
        (row,) = prompts.tokens(["Rate: a film\nScore:"], 0)
        assert whole.tolist()[len(row) :][: len(candidate)] == candidate
        assert backbone.tokenizer.decode(candidate[:-1]) == f" {answer}"


def test_in_a_chat_examples_are_earlier_turns(backbone):
    prompts = Prompts(backbone, EXAMPLES, chat_template=True)
    text = "<s>user: one:</s><s>assistant: 1</s><s>user: row:</s><s>assistant:"
    assert prompts.text("row:", 1) == text
    # This template has a space before an answer, which belongs to the answer, and ends its turn with </s>.
    assert prompts.border(1) == {"lead": " ", "end": "</s>"}
    (tokens,) = prompts.tokens(["row:"], 1)
    assert tokens.tolist() == backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_empty_thought_before_the_answer_goes_into_the_prompt(backbone):
    backbone.tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{% if message['role'] == 'assistant' %}<think></think>"
        "{% endif %}{{ message['content'] }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert chat_border(backbone.tokenizer) == ("<think></think>", "[end]\n")
    prompts = Prompts(backbone, [], chat_template=True)
    assert prompts.text("row", 0) == "[user]row[end]\n[assistant]<think></think>"
    assert prompts.border(0) == {"lead": "", "end": "[end]\n"}


def test_as_many_examples_as_fit_beside_the_longest_row(backbone):
    examples = [Example(f"a film so warm, number {number}:", "3.5") for number in range(30)]
    prompts = Prompts(backbone, examples, chat_template=False)
    rows = ["short:", "a film so long that it has a longer text:"]
    used = prompts.fitting("test", rows, 128, 30)
    assert 0 < used < 30
    longest = max(len(tokens) for tokens in prompts.tokens(rows, used))
    more = max(len(tokens) for tokens in prompts.tokens(rows, used + 1))
    assert longest + NEW_TOKENS <= 128 < more + NEW_TOKENS + 2
    assert prompts.fitting("test", rows, 10_000, 30) == 30
    assert prompts.fitting("test", rows, 10_000, 4) == 4
    assert prompts.fitting("test", rows, 128, 0) == 0


def test_rows_that_leave_no_room_are_refused(backbone):
    prompts = Prompts(backbone, [Example("x " * 60, "1")], chat_template=False)
    row = "a film so warm"
    length = len(prompts.tokens([row], 0)[0])
    assert prompts.fitting("test", ["x", row], length + NEW_TOKENS, 0) == 0
    with pytest.raises(
        DataError,
        match=f"row 1 of test has {length} tokens, which with {NEW_TOKENS} for the answer do not fit the context of",
    ):
        prompts.fitting("test", ["x", row], length, 0)
    with pytest.raises(DataError, match="not one example fits the context of 60 tokens beside the longest row of test"):
        prompts.fitting("test", [row], 60, 8)


def test_the_hash_is_of_the_examples_that_are_used(backbone):
    prompts = Prompts(backbone, EXAMPLES, chat_template=False)
    assert prompts.hash(0) is None
    assert prompts.hash(1) == Prompts(backbone, EXAMPLES[:1], chat_template=False).hash(1)
    assert len({prompts.hash(1), prompts.hash(2), Prompts(backbone, EXAMPLES[::-1], chat_template=False).hash(2)}) == 3


def test_what_all_rows_begin_with():
    rows = [np.array(row) for row in ([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 9])]
    assert common_prefix(rows) == 2
    assert common_prefix(rows[:2]) == 3
    assert common_prefix(rows[:1]) == 3
    assert common_prefix([rows[0], rows[0]]) == 3
    assert common_prefix([np.array([7]), rows[0]]) == 0


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_model):
    files = find_backbone(tiny_model("gpt2"), gguf_file=None, revision=None)
    backbone = Backbone(files, layers=(), compute_dtype="float32", device="cpu", trust_remote_code=False)
    with pytest.raises(BackboneError, match="the tokenizer of tiny-gpt2 has no chat template"):
        Prompts(backbone, [], chat_template=True)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(backbone):
    prompts = Prompts(backbone, EXAMPLES, chat_template=False)
    plain = backbone.encode([prompts.text("a film\nScore:", 2)], special_tokens=False)[0].tolist()
    bos, eos = (getattr(backbone.tokenizer, f"{name}_token_id") for name in ("bos", "eos"))
    for template, begin in (("<s> $A </s>", [bos]), ("$A </s>", []), ("<s> $A", [bos]), ("$A", [])):
        backbone.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", bos), ("</s>", eos)]
        )
        prompts = Prompts(backbone, EXAMPLES, chat_template=False)
        assert prompts.tokens(["a film\nScore:"], 2)[0].tolist() == [*begin, *plain]
