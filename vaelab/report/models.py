"""The results page on the embedded models: what they draw, and which block of the U-Net does what."""

import pandas as pd

from vaelab.core.stats import wilson
from vaelab.report.markdown import Picture, listed, percent, percent_between, span, table
from vaelab.report.page import Entry, Section, Shown
from vaelab.report.runs import FinishedRun

FACTORS = ("shape", "colour", "size", "position", "texture", "ground", "count")
SOURCES = {
    "oracle": "the oracle, on rendered pictures",
    "vae": "the same after the model's autoencoder",
    "model": "the model, `test`",
    "model.unseen": "the model, `unseen`",
}


def drawing(run: FinishedRun) -> Shown:
    """Show which factors the text-to-image model draws as its prompts name them."""
    columns = ("source", "factor", "pictures", "accuracy")
    accuracies = pd.concat([run.table("oracle", *columns), run.table("model", *columns)])
    cells = accuracies.set_index(["source", "factor"])
    rows = [
        [name, *(_cell(cells, source, factor, interval=source.startswith("model")) for factor in FACTORS)]
        for source, name in SOURCES.items()
    ]
    oracle = [cells.loc[("oracle", factor), "accuracy"] for factor in FACTORS]
    model = {factor: cells.loc[("model", factor), "accuracy"] for factor in FACTORS[:-1]}
    unseen = [cells.loc[("model.unseen", factor), "accuracy"] for factor in FACTORS[:-1]]
    hardest = min(model, key=model.get)
    lost = max(before - after for before, after in zip(model.values(), unseen, strict=True))
    finding = (
        f"The oracle recognises each factor in {span(oracle, percent)} of rendered pictures, and the text-to-image "
        f"model draws each factor of its prompts correctly in {span(model.values(), percent)} of the pictures; "
        f"the hardest is the {hardest}."
    )
    steps = run.table("steps", "steps", *FACTORS)
    few = [[int(row["steps"]), *(percent(row[factor]) for factor in FACTORS)] for row in steps.to_dict("records")]
    return Shown(finding, [
        "The **oracle** reads the factors of any picture by the renderer's rules alone. In `test`, the combination of "
        "shape, colour, size and position of every thing was never trained on; in `unseen`, not even the pair of shape "
        f"and colour. Unseen pairs cost at most {100 * lost:.1f} points. A factor counts as correct where it is "
        "correct for every thing of the picture; the count is the number of things.",
        table(["share of pictures that are correct", *FACTORS], rows),
        f"The same with other numbers of denoising steps, over {run.params['compared_images']} prompts:",
        table(["steps", *FACTORS], few),
        *[Picture(path, "What the embedded model draws. In brackets stands what the oracle recognises where it "
                  "differs from the prompt.") for path in run.pictures("pictures-test")],
    ])  # fmt: skip


def transformer(run: FinishedRun) -> Shown:
    """Show how well the class-conditional transformer draws its classes."""
    rows = run.table("model", "source", "factor", "pictures", "accuracy")
    own = rows[rows["source"] == "dit"].set_index("factor")
    shares = {factor: own.loc[factor, "accuracy"] for factor in ("colour", "shape", "count")}
    return Shown(
        f"The transformer draws the colour of its class in {percent(shares['colour'])} of the pictures and the shape "
        f"in {percent(shares['shape'])}; {percent(shares['count'])} show one thing alone, as every training picture "
        "does.",
        [
            "Its classes are the pairs of colour and shape in the training split, such as `red circle`; size, position "
            f"and ground are not given. It draws in {run.params['class_steps']} steps with guidance "
            f"{run.params['class_guidance_scale']:g}.",
            table(["", *shares], [["correct", *(_cell(own, factor) for factor in shares)]]),
        ],
    )


def _cell(cells: pd.DataFrame, *key: str, interval: bool = True) -> str:
    row = cells.loc[key if len(key) > 1 else key[0]]
    share, count = row["accuracy"], int(row["pictures"])
    if not interval:
        return percent(share)
    return f"{percent(share)} ({percent_between(*wilson(round(share * count), count))})"


SECTION = Section(
    "The embedded models",
    "The **world** is a set of drawn scenes in which every factor is known: one to three things, each with a shape, a "
    f"colour, a size and a position, on a ground with a texture and a colour. The factors are {listed(FACTORS[:-1])}. "
    "Each picture has a prompt in plain English and a mask of every thing. Because the truth is known, claims about a "
    "model's features can be checked.",
    (
        Entry("What the text-to-image model draws: checked by the oracle", ("02_judge_embedded_models/full",), drawing),
        Entry("What the transformer draws: checked by the oracle", ("02_judge_embedded_models/full",), transformer),
    ),
)
