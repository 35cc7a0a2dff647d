"""Publish gates or a retrofitted model."""

from pathlib import Path

from companion.cli.app import arg, command, opt

RETROFIT = "Retrofit"


@command(RETROFIT, "push")
def push(
    checkpoint: arg(Path, "a checkpoint of a retrofit, such as runs/mine/cr8", "DIR"),
    repo: opt(str, "the repository on the hub", metavar="OWNER/NAME"),
    licence: opt(str, "such as apache-2.0; it must not allow what the base model's forbids"),
    base: opt(str, "the model that was retrofitted, a hub id"),
    base_licence: opt(str, "the base model's (default: what its card on the hub says)") = None,
    evaluation: opt(Path, "a curves.json with results of this checkpoint", metavar="FILE") = None,
    private: opt(bool, "for its owner alone", "--private") = False,
    card_only: opt(bool, "write the card, upload nothing", "--card-only") = False,
):
    """publish a checkpoint on the hub, with a model card"""
    from companion.share import CARD, share_gates, write_card

    facts = {"licence": licence, "base_model": base, "base_licence": base_licence, "evaluation": evaluation}
    address = None
    if card_only:
        write_card(checkpoint, repo, **facts)
    else:
        address = share_gates(checkpoint, repo, private=private, **facts)
    yield address or str(checkpoint / CARD)
    return {"card": str(checkpoint / CARD), "repo": repo, "url": address}
