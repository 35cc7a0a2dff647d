"""``dms eval``: tasks of lm-evaluation-harness on a retrofitted model."""

from pathlib import Path

HELP = """\
  dms eval --json          {"model", "gates", "results": {task: {metric: value}}, "samples": {task: number}, "kv": null
                           or {"generations", "kv_reads", "dense_kv_reads", "peak_tokens", "dense_peak_tokens",
                           "cr_reads", "cr_peak"}}; kv: means over the generations, in tokens per KV head
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("eval", run_eval, "run tasks of lm-evaluation-harness on a retrofitted model")
    command.add_argument(
        "--model", required=True, help="a directory or hub id: retrofitted by us or the authors, or plain"
    )
    command.add_argument("--tasks", required=True, help="names of the harness's tasks, separated by commas")
    command.add_argument("--limit", type=int, help="only so many samples of each task")
    command.add_argument("--include", type=Path, metavar="DIR", help="a folder with more task files")
    command.add_argument("--tokenizer", help="a directory or hub id (default: the model's)")
    command.add_argument("--gates-off", action="store_true", help="evict nothing, for comparison")
    command.add_argument("--batch-size", type=int, default=1, help="requests run together (default 1)")
    command.add_argument("--num-fewshot", type=int, help="examples in the prompt (default: the task's own)")
    command.add_argument("--apply-chat-template", action="store_true", help="put prompts into the chat template")
    command.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def run_eval(args) -> dict:
    """Raises ValueError for a missing package, model or task, and for numbers below 1."""
    import torch

    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} {value}: must be >= 1")
    if args.include is not None and not args.include.is_dir():
        raise ValueError(f"{args.include}: not a folder")
    try:
        from companion.tasks.lm_eval import DMSLM, evaluate, find_tasks
    except ImportError as error:
        raise ValueError(str(error)) from None
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    manager = find_tasks(tasks, args.include)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = DMSLM(args.model, args.tokenizer, not args.gates_off, device=device, batch_size=args.batch_size)
    options = {"num_fewshot": args.num_fewshot, "apply_chat_template": args.apply_chat_template}
    result = {"model": args.model, **evaluate(lm, tasks, manager, args.limit, **options)}
    if not args.json:
        print("\n".join(lines(result)))
    return result


def lines(result: dict) -> list[str]:
    """The result in words, one line a metric."""
    said = []
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,", 1))
                said.append(f"{task} {name}: {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    if kv := result["kv"]:
        ratio = f", {kv['cr_reads']:.2f}x fewer" if kv["cr_reads"] else ""
        said.append(f"KV reads {kv['kv_reads']:.0f} a generation and KV head{ratio} than dense; "
                    f"peak tokens {kv['peak_tokens']:.1f}, {kv['cr_peak']:.2f}x fewer")  # fmt: skip
    return said
