"""Conversations in which the model itself answers procedural questions: the data of a retrofit without any corpus.

The paper does the same for Llama 3.2 1B (appendix on training data): the student learns to evict on the text that it
will have to write.  Questions come from reasoning-gym, answers are the model's own, greedy, right or wrong; several
exchanges make one document, so that most of what was said is over and can be forgotten.
"""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dms_core.chat import chat_ids
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.storage import write_jsonl

NUMBERS = ("basic_arithmetic", "chain_sum", "gsm_symbolic", "leg_counting", "number_sorting", "simple_equations")
WORDS = ("calendar_arithmetic", "family_relationships", "letter_counting", "spell_backward", "time_intervals")
QUESTIONS = sorted((*NUMBERS, *WORDS, "word_sorting"))


def questions(count: int, seed: int) -> list[str]:
    """``count`` questions, the kinds in turn; another seed (1, 2, ...) gives others.  Needs reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("questions come from reasoning-gym: pip install reasoning-gym") from None
    each = -(-count // len(QUESTIONS))
    start = 10**6 * (seed - 1) + 1  # far apart: reasoning-gym's question i of seed s is question 0 of seed s + i
    kinds = [reasoning_gym.create_dataset(name, size=each, seed=start) for name in QUESTIONS]
    return [kinds[i % len(kinds)][i // len(kinds)]["question"] for i in range(count)]


def conversations(
    model, tokenizer, count: int, turns: int, seed: int, max_new_tokens: int = 160, batch: int = 48
) -> Iterator[list[dict]]:
    """``count`` conversations of ``turns`` exchanges as chat messages; every question is answered by itself.

    ``model`` has DMS gates and answers with them off.
    """
    asked = questions(count * turns, seed)
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    config = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0, batch=batch, stride=max_new_tokens)
    answers: dict[int, str] = {}
    jobs = [(i, 0) for i in range(len(asked))]
    done = 0
    with model.dms.disabled(), tqdm(total=len(asked), desc="answers", unit="answer", mininterval=2) as bar:
        for chain in sample_chains(model, tokenizer, prompts, jobs, config):
            answers[chain.problem] = tokenizer.decode(chain.tokens).strip()
            bar.update()
            while done < count and all(i in answers for i in range(done * turns, (done + 1) * turns)):
                yield [
                    message
                    for i in range(done * turns, (done + 1) * turns)
                    for message in ({"role": "user", "content": asked[i]}, {"role": "assistant", "content": answers[i]})
                ]
                done += 1


def write_conversations(file: Path | str, *args, **kwargs) -> Path:
    """``conversations`` to a JSONL file, whole or not at all."""
    write_jsonl(file, ({"messages": messages, "learn": "all"} for messages in conversations(*args, **kwargs)))
    return Path(file)
