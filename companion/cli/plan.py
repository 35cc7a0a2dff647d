"""``dms plan``: what decoding a model costs."""

HELP = """\
  dms plan --json          {"model", "batch", "context", "cr", "device", "parameters", "weight_bytes", "kv_bytes",
                           "kv_bytes_per_token", "flops", "read_bytes", "latency_s", "tokens_per_s",
                           "kv_latency_share", "largest_batch", "retrofit_h100_hours"}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("plan", run_plan, "what decoding a model costs, by the roofline model of the paper's appendix I")
    command.add_argument("--model", required=True, help="a built-in name such as llama-3.1-8b, a directory or a hub id")
    command.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    command.add_argument("--context", type=int, default=8192, help="tokens of each")
    command.add_argument("--cr", type=float, default=1.0, help="compression ratio of the cache")
    command.add_argument("--device", default="h100", help="a100, h100 (default) or h200")


def run_plan(args) -> dict:
    from companion.cost.planner import lines, plan

    result = plan(args.model, args.batch, args.context, args.cr, args.device)
    if not args.json:
        print("\n".join(lines(result)))
    return result
