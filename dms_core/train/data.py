"""Training documents for real models: rows of a data set, chat template, token ids, packed rows.

A row is one of OpenR1-Math-220k (``problem``, ``generations`` and, aligned with them, ``correctness_math_verify`` and
``is_reasoning_complete``; every generation that Math-Verify accepts and that is complete becomes a document), a
conversation (``messages``, of which the last one is learnt, or with ``"learn": "all"`` whatever the assistant says), or
plain ``text``.  Labels cover completions only.  A document longer than the context is cut to it: a distillation target
needs no ending.  Cuts are counted.

Documents are packed into rows of at most ``context`` tokens; positions start over with every document, and attention,
eviction and losses keep such documents apart (``step.documents``).  An epoch is a seeded permutation of the documents,
each put into the fullest of a few open rows that has room for it.  Row i of a run is a function of (store, context,
seed, i): a resumed run needs no state.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from dms_core.chat import chat_ids, chat_text
from dms_core.storage import claim, only_writer, parse_json, read_json, write_json

THINK = "<think>"
SHUFFLE_BUFFER = 10_000  # rows of a hub data set that are shuffled among each other while they stream
OPEN = 32  # rows that are open at once: 97 % full for lengths spread evenly up to the context
SOURCE = "documents.json"  # what a directory of documents was made from


@dataclass(frozen=True)
class Store:
    """Documents as one array of token ids on disk."""

    tokens: np.ndarray  # uint32, memory-mapped
    learnt: np.ndarray  # bool, memory-mapped: whether the token has a label
    table: np.ndarray  # (documents, 2): offset, length
    facts: dict  # what was read, kept, cut and dropped

    def __len__(self) -> int:
        return len(self.table)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of one document; its first token has no label."""
        offset, length = self.table[index]
        ids = self.tokens[offset : offset + length].astype(np.int64)
        return ids, np.where(self.learnt[offset : offset + length], ids, -100)


def completions(row: dict) -> list[tuple[list[dict], str]]:
    """(messages of the prompt, completion) of a row: none where no generation was accepted.

    Raises ValueError that begins with the name of the field that is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}: must be an object")
    if "generations" in row:
        return _accepted(row)
    if "messages" in row:
        turns = _field(row, "messages", list, "a list of {role, content}")
        for turn in turns:
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
                raise ValueError(f"messages: holds {str(turn)[:60]!r}; each must have role and content, both text")
        if not turns or turns[-1]["role"] != "assistant":
            raise ValueError("messages: the last one must have role 'assistant'")
        return [(turns[:-1], turns[-1]["content"])]
    if "text" in row:
        return [([], _field(row, "text", str, "text"))]
    raise ValueError(f"generations: missing, and so are messages and text; the row has {sorted(row)[:12]}")


def _accepted(row: dict) -> list[tuple[list[dict], str]]:
    problem = _field(row, "problem", str, "text")
    generations = _field(row, "generations", list, "a list of text")
    if not all(isinstance(text, str) for text in generations):
        raise ValueError("generations: must be a list of text")
    accepted = _flags(row, "correctness_math_verify")
    complete = _flags(row, "is_reasoning_complete") if "is_reasoning_complete" in row else [True] * len(generations)
    prompt = [{"role": "user", "content": problem}]
    return [(prompt, text) for text, *good in zip(generations, accepted, complete, strict=False) if all(good)]


def _flags(row: dict, name: str) -> list[bool]:
    """One flag a generation; null means that nothing was verified."""
    flags = [] if row.get(name, ...) is None else _field(row, name, list, "a list of true and false, or null")
    if not all(flag is None or isinstance(flag, bool) for flag in flags):
        raise ValueError(f"{name}: must be a list of true and false, or null")
    return flags


def _field(row: dict, name: str, kind: type, words: str):
    if name not in row:
        raise ValueError(f"{name}: missing; must be {words}")
    if not isinstance(row[name], kind):
        raise ValueError(f"{name}: is {type(row[name]).__name__}; must be {words}")
    return row[name]


def encode(tokenizer, prompt: list[dict], completion: str) -> tuple[list[int], int]:
    """Token ids of prompt, completion and end-of-sequence, and the prompt's length in tokens.

    The chat template renders the prompt alone: those of reasoning models strip the reasoning of what is passed as an
    assistant's turn.  Where the template already opens <think>, the completion's own is dropped.  Without a template,
    texts are joined by empty lines.
    """
    if prompt and tokenizer.chat_template:
        text = chat_text(tokenizer, prompt)
        if text.rstrip().endswith(THINK) and completion.lstrip().startswith(THINK):
            completion = completion.lstrip().removeprefix(THINK).lstrip("\n")
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        head = tokenizer("".join(turn["content"] + "\n\n" for turn in prompt))["input_ids"]
    return [*head, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], len(head)


def encode_conversation(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation by the chat template, and which the assistant says, its end marks included.

    Raises ValueError if the template renders a turn otherwise once others follow: then only last turns can be learnt.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = (chat_ids(tokenizer, messages[:end], waiting=end == i) for end in (i, i + 1))
        if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt:
            raise ValueError("learn: is 'all', but this chat template renders earlier turns otherwise later on")
        learnt += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids = whole
    return ids, learnt


def documents(tokenizer, row: dict) -> list[tuple[list[int], np.ndarray]]:
    """(token ids, which are learnt) of each document of a row; a document's first token never is."""
    found = completions(row)
    if row.get("learn") == "all" and "messages" in row:
        pairs: list = [encode_conversation(tokenizer, row["messages"])]
    else:
        encoded = [encode(tokenizer, prompt, completion) for prompt, completion in found]
        pairs = [(ids, np.arange(len(ids)) >= head) for ids, head in encoded]
    return [(ids, np.asarray(learnt, bool) & (np.arange(len(ids)) > 0)) for ids, learnt in pairs]


def read_rows(data: str, seed: int) -> Iterator[tuple[str, dict]]:
    """(place, row) of a JSONL file in order, or of a hub data set's training split, streamed and shuffled."""
    file = Path(data)
    if file.is_file():
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}:{number}"
                    yield place, parse_json(line, place)  # of bytes: it skips a byte-order mark
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(data, split="train", streaming=True).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except Exception as error:  # offline, unknown, gated: datasets raises errors of many kinds
        reason = str(error).split("\n")[0]
        raise ValueError(f"data {data!r}: neither a JSONL file nor a hub data set in reach ({reason})") from error
    for number, row in enumerate(rows):
        yield f"{data} row {number} (seed {seed})", row


def prepare(data: str, tokenizer, context: int, tokens: int, directory: Path | str, seed: int = 0) -> Store:
    """Documents of ``data``, at most about ``tokens`` tokens of them, kept in ``directory`` and reused from there.

    Under torchrun the first process writes and the others wait for its files.  Raises ValueError where a row does not
    fit the schema, naming place and field; where no document is left; where ``directory`` holds other
    documents; and while another process writes beside it.
    """
    directory = Path(directory)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    key = {"tokenizer": _fingerprint(tokenizer), "context": context, "tokens": tokens, "seed": seed}
    if Path(data).is_file():  # known by its contents, a hub data set by its name
        with open(data, "rb") as file:
            key["data"] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    else:
        key["data"] = data
    if int(os.environ.get("RANK", 0)):
        while not (directory / SOURCE).exists():
            time.sleep(0.2)
    elif not (directory / SOURCE).exists():
        part = directory.with_name(directory.name + ".part")
        with only_writer(directory.parent):
            shutil.rmtree(part, ignore_errors=True)
            claim(part, key, SOURCE)
            _write(data, tokenizer, context, tokens, part, seed)
            part.rename(directory)
    claim(directory, key, SOURCE)
    facts = read_json(directory / "facts.json")
    table = np.load(directory / "table.npy")
    tokens_file, learnt_file = directory / "tokens.bin", directory / "learnt.bin"
    return Store(np.memmap(tokens_file, np.uint32, "r"), np.memmap(learnt_file, bool, "r"), table, facts)


def _write(data: str, tokenizer, context: int, tokens: int, part: Path, seed: int) -> None:
    counted = ("rows", "rejected_rows", "documents", "cut", "tokens_cut", "dropped", "tokens", "labelled")
    facts = dict.fromkeys(counted, 0)
    table, bar = [], tqdm(total=tokens, desc="documents", unit="tok", unit_scale=True, mininterval=2)
    with (part / "tokens.bin").open("wb") as file, (part / "learnt.bin").open("wb") as marks:
        for place, row in read_rows(data, seed):
            try:
                found = documents(tokenizer, row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            facts["rows"] += 1
            facts["rejected_rows"] += not found
            for ids, learnt in found:
                facts["cut"] += len(ids) > context
                facts["tokens_cut"] += max(len(ids) - context, 0)
                ids, learnt = ids[:context], learnt[:context]
                if not learnt.any():  # nothing to predict is left
                    facts["dropped"] += 1
                    continue
                table.append((facts["tokens"], len(ids)))
                np.asarray(ids, np.uint32).tofile(file)
                learnt.tofile(marks)
                facts["documents"] += 1
                facts["tokens"] += len(ids)
                facts["labelled"] += int(learnt.sum())
                bar.update(len(ids))
            if facts["tokens"] >= tokens:
                break
    bar.close()
    if not table:
        raise ValueError(f"data {data!r}: no document of {facts['rows']} rows is left ({json.dumps(facts)})")
    np.save(part / "table.npy", np.array(table, np.int64))
    write_json(part / "facts.json", facts)


def _fingerprint(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = tokenizer.name_or_path if backend is None else backend.to_str()
    text = json.dumps([text, tokenizer.chat_template, tokenizer.eos_token_id])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Indices of the documents of each row, for documents in this order; none may be longer than ``context``."""
    rows: list[list[int]] = []  # finished
    places: list = []  # [room, row] of the open ones
    for index, length in enumerate(lengths.tolist()):
        if fits := [place for place in places if place[0] >= length]:
            place = min(fits)
        else:
            if len(places) == OPEN:
                places.remove(fullest := min(places))
                rows.append(fullest[1])
            places.append(place := [context, []])
        place[0] -= length
        place[1].append(index)
    return rows + [row for _, row in places]


class PackedRows(Dataset):
    """``size`` rows of as many epochs as that takes: input_ids, labels (-100: not predicted) and position_ids.

    ``alone``: one document a row, for models that would carry a state from one document into the next.
    """

    def __init__(self, store: Store, context: int, size: int, seed: int = 0, alone: bool = False) -> None:
        if size < 1:
            raise ValueError(f"size {size}: must be >= 1")
        self.store, self.context, self.size, self.seed, self.alone = store, context, size, seed, alone
        self.starts = [0]  # first row of each epoch that has been packed, and of the next
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        while self.starts[-1] <= index:
            self.starts.append(self.starts[-1] + len(self._epoch(len(self.starts) - 1)))
        epoch = int(np.searchsorted(self.starts, index, side="right")) - 1
        ids, labels = zip(*map(self.store.document, self._epoch(epoch)[index - self.starts[epoch]]), strict=True)
        places = np.concatenate([np.arange(len(document)) for document in ids])
        return {"input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "position_ids": places}

    def _pack_epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.store))
        if self.alone:
            return list(order[:, None])
        return [order[row] for row in pack(self.store.table[order, 1], self.context)]
