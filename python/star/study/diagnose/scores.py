"""What the rewards of a group differ in, and what the scores after training are made of."""

from __future__ import annotations

from star.study.tables import Table, format_number


def variance_table(measured: dict) -> Table:
    """variance: by category the share of each component; "all" has every component."""
    components = list(measured["variance"]["all"])
    rows = [
        [category, *(format_number(shares.get(name)) for name in components)]
        for category, shares in measured["variance"].items()
    ]
    title = "share of the variance of the advantages by what differs between the images of a group"
    return Table(title, ["category", *components], rows)


def composition_table(measured: dict) -> Table:
    """composition: by arm, "untrained" first."""
    seeds = measured["trained_seeds"]
    rows = [
        [
            arm,
            str(seeds.get(arm, "-")),
            *(format_number(parts[name]) for name in ("requirements", "unasked", "more", "fewer")),
        ]
        for arm, parts in measured["composition"].items()
    ]
    title = (
        "what the held-out scores are made of after training: the prompts' own requirements, less what unasked objects "
        "take off; share of images with more and with fewer objects than requested"
    )
    return Table(title, ["arm", "seeds", "requirements", "unasked objects", "more", "fewer"], rows)
