"""What the numbers and pictures of a pretraining run mean: a text beside them in TensorBoard."""

import math

from dinocell.ssl.config import PretrainConfig


def guide(config: PretrainConfig) -> str:
    """Return it as Markdown; every name that a run logs is in it (``/*``: and all others of its group)."""
    prototypes = config.heads.num_prototypes
    undecided = f"ln {prototypes} = {math.log(prototypes):.2f}"
    rows = (
        ("`loss/dino_global`, `loss/dino_local`", f"nats; {undecided} is no opinion, a fall below it is learning"),
        (
            "`loss/ibot`",
            f"nats; no opinion is {math.log(prototypes):.2f} times the share of samples with hidden patches",
        ),
        ("`loss/koleo`", "spread of the features over the sphere; falls by itself, so a falling total proves nothing"),
        ("`loss/gram`", "distance to the Gram teacher's patch similarities"),
        ("`loss/total`", "the weighted sum, that which is minimised"),
        ("`targets/entropy`", f"nats, of one target; {undecided}: the teacher has no opinion; should fall"),
        ("`targets/mean_entropy`", "nats, of the mean target; near `targets/entropy`: all tiles get the same"),
        ("`targets/used`", "share of the prototypes that are some row's favourite, 0 to 1; a handful only: collapse"),
        ("`cls/std`", "1: features spread evenly; toward 0: all are the same"),
        ("`cls/effective_rank`", f"directions in use, 1 to {config.batch_size} at most; toward 1: collapse"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}; should be steady"),
        ("`schedule/*`", "what the recipe asks for at this step: rates, weights, momentum, temperature"),
        ("`health/skipped_steps`", "steps left out because something was not finite; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "tiles and steps a second over all processes"),
        ("`speed/data_wait_share`", "share of the time in which the step waits for data, 0 to 1"),
        ("`speed/tflops`, `speed/mfu`", "10^12 operations a second of a device; their share of its peak, 0 to 1"),
        ("`memory/gb`, `memory/peak_gb`", "10^9 bytes; of the device, or of the process on a CPU"),
        (
            "`probe/*`",
            "of the teacher: margin of channel consistency, retrieval, neighbours; above random weights, rising",
        ),
    )
    pictures = (
        ("views", "a tile a row (of `stack`, a row a channel): global crops, then local ones; -2.5 to 2.5 deviations"),
        (
            "patch_pca",
            "a tile a column: a global view and below it its patches' three main components as red, green, blue, then "
            "the second view in the same way; one basis for all, so what is alike has one colour",
        ),
        ("cls_attention", "a tile a column: a global view, and where the CLS token looks, black (not) to white (most)"),
    )
    return "\n".join(
        [
            "| number | unit, and what to look for |\n|---|---|",
            *(f"| {names} | {meaning} |" for names, meaning in rows),
            "\n| picture | what it shows |\n|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in pictures),
            "\nMore: docs/training.md, what to watch.",
        ]
    )
