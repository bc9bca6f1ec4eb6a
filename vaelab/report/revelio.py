"""The results page on "Revelio: Interpreting and leveraging semantic information in diffusion models" (Kim et al.)."""

import pandas as pd

from vaelab.probing import plots, tables
from vaelab.probing.layer_features import with_block_and_timestep
from vaelab.report.markdown import Chart, Picture, listed, number, percent, percent_between, span, table
from vaelab.report.page import Absent, Entry, Section, Shown
from vaelab.report.runs import FinishedRun
from vaelab.sae.granularity import OPTIONS, RANDOM

LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
TABLE_1 = {
    layer: dict(zip(OPTIONS, shares, strict=True))
    for layer, shares in {
        "bottleneck": (25, 52, 22, 1), "up_ft0": (33, 46, 20, 1), "up_ft1": (47, 41, 11, 1), "up_ft2": (28, 50, 20, 2),
    }.items()
}  # fmt: skip
"""GPT-4o's answers to what the top pictures of features share, in percent of the features; Pets, t = 25."""
TABLE_2A = {
    "Pets": (9.48, 9.90, 8.59, 9.67),
    "Caltech-101": (9.35, 15.65, 21.33, 25.61),
    "ImageNet": (25.35, 29.10, 34.3, 36.38),
}
"""sigma_label by data set, for each of ``LAYERS``."""
TABLE_2B = {0: (8.99, 11.91), 25: (8.59, 9.35), 100: (8.87, 8.72), 200: (8.94, 8.17), 300: (9.01, 10.41),
            500: (9.53, 16.65)}  # fmt: skip
"""sigma_label by timestep: Pets at up_ft1, Caltech-101 at bottleneck."""
TABLE_2D = {6: 10.18, 10: 9.44, 14: 9.05, 18: 9.55, 22: 9.84}
"""sigma_label on Pets by block of the DiT, t = 25."""
TABLE_3 = {"bottleneck": (69.97, 68.03), "up_ft1": (88.61, 86.89), "block10": (87.49, 80.89), "block14": (88.61, 83.02)}
"""Test accuracy of Diff-C on Pets, in percent, at t = 25 and 200: Stable Diffusion 1.5 and DiT."""
TABLES_6_TO_8 = {
    "Aircraft": {0: (52.27, 48.79, 64.09, 50.55), 25: (51.76, 50.49, 65.07, 50.25), 100: (51.07, 49.48, 64.15, 51.37),
                 200: (50.91, 49.63, 63.88, 50.53)},
    "Pets": {0: (68.79, 66.99, 88.28, 77.79), 25: (69.97, 73.29, 88.61, 81.63), 100: (69.53, 67.07, 88.29, 78.82),
             200: (68.03, 65.87, 86.89, 78.49)},
    "Caltech-101": {0: (85.83, 85.75, 86.75, 79.11), 25: (87.59, 86.54, 87.72, 81.07),
                    100: (88.28, 88.18, 87.99, 82.02), 200: (88.36, 87.23, 89.22, 82.69)},
}  # fmt: skip
"""Test accuracy of Diff-C in percent with an empty prompt, by data set and timestep, for each of ``LAYERS``."""
TABLE_5 = {"Pets": (87.3, 88.69), "Aircraft": (26.04, 65.07)}
"""Test accuracy in percent of the diffusion classifier (Li et al.) and of Diff-C with an empty prompt."""
SECONDS = (24.0, 0.13)
"""Seconds per picture of the two (section 4.7)."""
LOWEST = 25
COLUMNS = ("layer", "factor", "classifier", "accuracy", "low", "high", "chance", "validation", "count")


def granularity(run: FinishedRun) -> Shown:
    """Show how fine the patterns are that features of each block respond to."""
    shares = run.table("granularity", "block", *TABLE_1["bottleneck"], "features")
    own = shares[shares["block"] != RANDOM]
    names = list(TABLE_1["bottleneck"])
    rows = [(row["block"] if row["block"] == RANDOM else f"`{row['block']}`", *(percent(row[name]) for name in names))
            for row in shares.to_dict("records")]  # fmt: skip
    rows += [(f"paper, `{layer}`", *(f"{share} %" for share in known.values())) for layer, known in TABLE_1.items()]
    found = [f"{percent(row[most])} of the features of `{row['block']}` are {most}" for row, most in
             ((row, max(names, key=row.get)) for row in own.to_dict("records"))]  # fmt: skip
    random = shares[shares["block"] == RANDOM]["no pattern"]
    control = f"; {percent(random.iloc[0])} of random sets of pictures have no pattern" if len(random) else ""
    return Shown(f"{listed(found)}{control}.", [
        f"The {run.params['granularity_pictures']} strongest pictures of a block's most active features "
        f"(at most {run.params['granularity_features']}), and what at least 70 % of them share, twice as often as all "
        "pictures do. Fine-grained: a thing of the same shape and colour, or a ground of the same texture and colour. "
        "Moderately granular: one of these factors alone. Very coarse: only a position or a size.",
        table(("layer", *names), rows),
    ])  # fmt: skip


def knowledge(run: FinishedRun, purity: FinishedRun | None) -> Shown:
    """Show what each layer and timestep encodes, by linear probe and Diff-C."""
    rows = run.table("accuracy", *COLUMNS)
    pure = purity.table("purity", "layer", "factor", "majority", "majority_chance") if purity else None
    factors = list(dict.fromkeys(rows["factor"]))
    cells, best = [], {}
    for factor in factors:
        own = dict(list(rows[rows["factor"] == factor].groupby("classifier")))
        best[factor] = _best(own["diffc"])
        cells.append((factor, percent(best[factor]["chance"]), _accuracy(_best(own["probe"])), _accuracy(best[factor])))
    hardest = min(best, key=lambda factor: best[factor]["accuracy"])
    paired = rows.pivot_table(index=["factor", "layer"], columns="classifier", values="accuracy").dropna()
    ahead = int((paired["diffc"] > paired["probe"]).sum())
    gains = (paired["diffc"] - paired["probe"]).groupby("factor").mean()
    where = best[hardest]["layer"]
    return Shown(
        f"The best layer for the hardest factor, the {hardest}, is `{where}`: Diff-C classifies "
        f"{percent(best[hardest]['accuracy'])} of the {hardest}s there. "
        f"Over all factors the best layer reaches {span([each['accuracy'] for each in best.values()], percent)}.",
        [
            "A **linear probe** is a linear classifier of a layer's mean over positions. **Diff-C** is the paper's "
            "small convolutional classifier of the layer's maps. A layer is a stage of the U-Net at a timestep: "
            "`up_ft1.t25` is the second stage on the way up, t = 25 of 1,000, where little noise is left. The layer is "
            f"**chosen on validation** scenes; accuracies are of {int(rows['count'].iloc[0])} others.",
            table(("factor", "most frequent class", "linear probe", "Diff-C"), cells),
            f"Diff-C is more accurate than the probe in {ahead} of {len(paired)} cells; by factor the mean gain is "
            f"{listed([f'{100 * gains[factor]:+.0f} points on {factor}' for factor in factors])}.",
            Chart("knowledge", lambda: plots.knowledge(tables.knowledge_tables(rows, pure)),
                  "Test accuracy by layer and timestep, one column a factor: linear probe, Diff-C, and the purity of "
                  "an autoencoder's features. The colour begins at chance, which stands over each panel, and ends at "
                  "1. Read each panel from top (early layer) to bottom (late), and from left (little noise) to right."),
        ],
    )  # fmt: skip


def layers(run: FinishedRun) -> Shown:
    """Show accuracy by layer at the lowest noise, beside the paper's."""
    own = _diffc(run)
    factors = [factor for factor in ("shape", "position") if factor in set(own["factor"])]
    own = own[own["timestep"] == LOWEST].set_index(["factor", "block"])
    blocks = list(dict.fromkeys(own.index.get_level_values("block")))
    rows = []
    for block in dict.fromkeys([*blocks, *LAYERS]):
        paper = [f"{by[LOWEST][LAYERS.index(block)]:.1f} %" if block in LAYERS else "" for by in TABLES_6_TO_8.values()]
        here = [_accuracy(own.loc[(factor, block)], layer=False) if block in blocks else "" for factor in factors]
        rows.append((f"`{block}`", *paper, *here))
    best = {factor: own.loc[factor]["accuracy"].idxmax() for factor in factors}
    same = [factor for factor in factors if best[factor] == "up_ft1"]
    return Shown(
        f"In the paper up_ft1 is best at t = {LOWEST}; here it is for {listed(same)}."
        if same
        else f"In the paper up_ft1 is best at t = {LOWEST}; here it is not: "
        + listed([f"{factor} is classified best from {best[factor]}" for factor in factors])
        + ".",
        [
            "Accuracy of Diff-C by layer, empty prompt. The U-Net here has no up_ft2.",
            table(
                ("layer", *(f"paper, {name}" for name in TABLES_6_TO_8), *(f"here, {each}" for each in factors)), rows
            ),
        ],
    )


def timesteps(run: FinishedRun) -> Shown:
    """Show accuracy by timestep at up_ft1, beside the paper's."""
    own = _diffc(run)
    own = own[own["block"] == "up_ft1"].set_index(["factor", "timestep"])
    factors = list(dict.fromkeys(own.index.get_level_values("factor")))
    steps = sorted({*own.index.get_level_values("timestep"), *TABLES_6_TO_8["Pets"]})
    place, rows = LAYERS.index("up_ft1"), []
    for step in steps:
        paper = [f"{by[step][place]:.1f} %" if step in by else "" for by in TABLES_6_TO_8.values()]
        here = [
            percent(own.loc[(factor, step), "accuracy"]) if (factor, step) in own.index else "" for factor in factors
        ]
        rows.append((step, *paper, *here))
    shape = own.loc["shape", "accuracy"]
    return Shown(
        f"On shapes t = {shape.idxmax()} is best ({percent(shape.max())}) and t = {shape.idxmin()} worst "
        f"({percent(shape.min())}); "
        + ("as for the paper's fine-grained data, low noise is best." if shape.idxmax() <= 100
           else "unlike for the paper's fine-grained data, the lowest noise is not best."),
        ["Accuracy of Diff-C at up_ft1 by timestep; larger t means more noise.",
         table(("t", *(f"paper, {each}" for each in TABLES_6_TO_8), *(f"here, {each}" for each in factors)), rows)],
    )  # fmt: skip


def purity(run: FinishedRun) -> Shown:
    """Show label purity, and how much it depends on the numbering of classes."""
    rows = with_block_and_timestep(run.table(
        "purity", "layer", "factor", "sigma_label", "sigma_label_chance", "sigma_label_low", "sigma_label_high",
        "majority", "majority_chance", "permutation_p",
    ))  # fmt: skip
    factor = run.params["factor"]
    own = rows[rows["factor"] == factor]
    lowest = own[own["timestep"] == own["timestep"].min()]
    cells = []
    for row in lowest.to_dict("records"):
        paper = [
            f"{values[LAYERS.index(row['block'])]:g}" if row["block"] in LAYERS else "" for values in TABLE_2A.values()
        ]
        cells.append((f"`{row['block']}`", *paper, number(row["sigma_label"]),
                      f"{number(row['sigma_label_low'])} to {number(row['sigma_label_high'])}",
                      f"{percent(row['majority'])} ({percent(row['majority_chance'])})"))  # fmt: skip
    change = (own["sigma_label_high"] - own["sigma_label_low"]).max()
    apart = own["sigma_label"].max() - own["sigma_label"].min()
    purest = {
        name: part.loc[part["majority"].idxmax()] for name, part in rows.groupby("factor", sort=False)
    }  # fmt: skip
    pure = [(name, f"`{row['layer']}`", percent(row["majority"]), percent(row["majority_chance"]),
             number(row["permutation_p"], 1))
            for name, row in purest.items()]  # fmt: skip
    return Shown(
        f"The paper's sigma_label depends on how classes are numbered: another numbering of the same {factor}s changes "
        f"it by up to {number(change, 2)} for one layer, "
        + ("more than" if change > apart else "beside")
        + f" the range of {number(apart, 2)} over all {len(own)} layers and timesteps.",
        [
            "A **k-SAE** is an autoencoder with k active features for a picture. **sigma_label** is the standard "
            "deviation of the class numbers of the ten pictures that activate a feature most, averaged over features; "
            "lower is purer. The **purity** beside it is the share of the most frequent class among the ten, which no "
            f"numbering changes. At t = {lowest['timestep'].iloc[0]}, for the {factor}:",
            table(("layer", *(f"paper, {name}" for name in TABLE_2A), "here, sigma_label", "over other numberings",
                   "purity (by chance)"), cells),
            f"The layer whose features are purest, of {len(own)}, by factor; p is of a permutation test:",
            table(("factor", "layer", "purity", "by chance", "p"), pure),
            "The paper's values by timestep (Table 2b): "
            + "; ".join(f"t = {step}: {pets:g} on Pets, {caltech:g} on Caltech-101"
                        for step, (pets, caltech) in TABLE_2B.items())
            + ".",
        ],
    )  # fmt: skip


def features(run: FinishedRun) -> Shown:
    """Show pictures that activate single features most."""
    pictures = run.pictures("features-*")
    layer = pictures[0].stem.removeprefix("features-") if pictures else ""
    return Shown(
        "",
        [Picture(path, f"Features of {layer}, chosen at random: one row a feature, the strongest picture first; the "
                 "label gives the entropy of the classes, and 0 means that all are of one class. Look for what "
                 "the pictures of a row share.") for path in pictures],
    )  # fmt: skip


def architectures(unet: FinishedRun, dit: FinishedRun) -> Shown:
    """Show U-Net and transformer side by side."""
    rows = with_block_and_timestep(dit.table("accuracy", *COLUMNS))
    probes = rows[(rows["classifier"] == "probe") & (rows["timestep"] == LOWEST)]
    factors, blocks = list(dict.fromkeys(probes["factor"])), list(dict.fromkeys(probes["block"]))
    cells = probes.set_index(["factor", "block"])
    by_block = [
        (factor, percent(cells.loc[(factor, blocks[0]), "chance"]),
         *(percent(cells.loc[(factor, block), "accuracy"]) for block in blocks))
        for factor in factors
    ]  # fmt: skip
    compared = []
    for factor in factors:
        best = [
            _best(part[(part["factor"] == factor) & (part["classifier"] == kind)])
            for part in (unet.table("accuracy", *COLUMNS), rows)
            for kind in ("probe", "diffc")
        ]
        compared.append((factor, *map(_accuracy, best)))
    spread = {factor: cells.loc[factor]["accuracy"] for factor in factors}
    hardest = min(factors, key=lambda factor: spread[factor].max())
    top = spread[hardest].idxmax()
    middle = blocks.index(top) not in (0, len(blocks) - 1)
    return Shown(
        f"In the transformer {'a middle block is best' if middle else 'the best block is not a middle one'} for the "
        f"hardest factor, the {hardest}: {top} with {percent(spread[hardest].max())}, {blocks[0]} with "
        f"{percent(spread[hardest][blocks[0]])}, {blocks[-1]} with {percent(spread[hardest][blocks[-1]])}"
        + ("; the paper finds the same of block 14 of 28." if middle else "; the paper finds block 14 of 28 best."),
        [
            f"Linear probe on the mean over positions, by block of the transformer, t = {LOWEST}:",
            table(("factor", "most frequent class", *blocks), by_block),
            "Each model's best layer, chosen on validation scenes:",
            table(("factor", "U-Net, probe", "U-Net, Diff-C", "transformer, probe", "transformer, Diff-C"), compared),
            "The paper (Pets, t = 25 and 200): "
            + "; ".join(f"{name} {first:g} % and {second:g} %" for name, (first, second) in TABLE_3.items())
            + ". Its sigma_label by block (Table 2d): "
            + "; ".join(f"block {block} {value:g}" for block, value in TABLE_2D.items())
            + ".",
        ],
    )  # fmt: skip


def zero_shot(colour: FinishedRun, ground: FinishedRun | None) -> Shown:
    """Show the denoiser itself as a classifier beside Diff-C."""
    rows, finding = [], []
    for run in filter(None, (colour, ground)):
        own = run.table("zero_shot", "classifier", "factor", "accuracy", "low", "high", "count", "accuracy_on_these",
                        "seconds_per_image").set_index("classifier")  # fmt: skip
        denoiser, diffc = own.loc["diffusion_classifier"], own.loc["diffc"]
        quotient = denoiser["seconds_per_image"] / diffc["seconds_per_image"]
        rows.append((f"here, {denoiser['factor']} ({int(denoiser['count'])} scenes)", _accuracy(denoiser, layer=False),
                     percent(diffc["accuracy_on_these"]), f"{denoiser['seconds_per_image']:.2g}",
                     f"{diffc['seconds_per_image']:.2g}", f"{quotient:.0f}"))  # fmt: skip
        finding.append(
            f"of the {denoiser['factor']}s {percent(denoiser['accuracy'])}, "
            f"Diff-C {percent(diffc['accuracy_on_these'])} in a time {quotient:.0f} times shorter"
        )
    paper = [
        (f"paper, {name}", f"{first:g} %", f"{second:g} %", f"{SECONDS[0]:g}", f"{SECONDS[1]:g}",
         f"{SECONDS[0] / SECONDS[1]:.0f}")
        for name, (first, second) in TABLE_5.items()
    ]  # fmt: skip
    return Shown(
        f"The denoiser as a zero-shot classifier names correctly {'; '.join(finding)}. Diff-C was trained for these "
        "classes, the denoiser was not.",
        [
            "The **diffusion classifier** (Li et al.) prompts the denoiser with each class in turn and chooses the "
            "class whose noise it predicts best.",
            table(("", "diffusion classifier", "Diff-C", "its seconds a picture", "Diff-C's seconds", "times"),
                  [*paper, *rows]),
            f"The paper calls the quotient of its times four orders of magnitude; it is {SECONDS[0] / SECONDS[1]:.0f}.",
        ],
    )  # fmt: skip


def cifar(run: FinishedRun, pure: FinishedRun | None) -> Shown:
    """Show the embedded U-Net on photographs."""
    every = run.table("accuracy", *COLUMNS)
    every = every[every["factor"] == run.params["factor"]]
    rows = with_block_and_timestep(every).set_index(["classifier", "block", "timestep"])
    steps = sorted(set(rows.index.get_level_values("timestep")))
    blocks = list(dict.fromkeys(rows.index.get_level_values("block")))
    cells = [
        (name, *(" / ".join(percent(rows.loc[(kind, block, step), "accuracy"]) for step in steps) for block in blocks))
        for kind, name in (("probe", "linear probe"), ("diffc", "Diff-C"))
    ]
    if pure:
        own = with_block_and_timestep(pure.table("purity", "layer", "factor", "majority", "majority_chance"))
        own = own[own["factor"] == pure.params["factor"]]
        chance, own = own["majority_chance"].mean(), own.set_index(["block", "timestep"])["majority"]
        cells.append((f"purity of features (by chance {percent(chance)})",
                      *(" / ".join(percent(own[(block, step)]) for step in steps) for block in blocks)))  # fmt: skip
    best = _best(every)
    asked = pd.DataFrame(run.results["tables"].get("zero_shot", []), columns=["classifier", "accuracy", "count"])
    zero = ""
    if "diffusion_classifier" in set(asked["classifier"]):
        few = asked.set_index("classifier").loc["diffusion_classifier"]
        zero = (f" The diffusion classifier, whose text encoder knows none of these words, is correct in "
                f"{few['accuracy'] * few['count']:.0f} of {int(few['count'])} pictures.")  # fmt: skip
    above = best["low"] > best["chance"]
    return Shown(
        f"{'The U-Net encodes something of photographs' if above else 'No classifier finds anything of photographs'}, "
        f"on which the U-Net was never trained: the best layer classifies {_accuracy(best)} of CIFAR-10, where always "
        f"naming the most frequent class is correct in {percent(best['chance'])}.",
        [
            f"Accuracy at t = {listed([str(step) for step in steps])} (separated by a stroke), "
            f"{int(best['count'])} test pictures.{zero}",
            table(("", *(f"`{block}`" for block in blocks)), cells),
        ],
    )  # fmt: skip


def maps(run: FinishedRun) -> Shown:
    """Show how well three principal components separate things from the ground."""
    rows = with_block_and_timestep(run.table("shares_of_variance", "layer", "foreground_auc", "jointly").assign(
        layer=lambda table: table["layer"].str.removesuffix(" (other)"),
    ))  # fmt: skip
    steps = sorted(set(rows["timestep"]))
    by = rows.set_index(["block", "timestep"])
    blocks = list(dict.fromkeys(rows["block"]))
    cells = [(f"`{block}`", *(number(by.loc[(block, step), "foreground_auc"], 2) for step in steps),
              percent(by.loc[(block, steps[0]), "jointly"])) for block in blocks]  # fmt: skip
    dit = [by.loc[(block, steps[0]), "foreground_auc"] for block in blocks if block.startswith("block")]
    unet = {block: by.loc[(block, steps[0]), "foreground_auc"] for block in blocks if not block.startswith("block")}
    where = "do show" if min(dit) > 0.9 else "show less well" if max(dit) > 0.7 else "do not show"
    return Shown(
        f"A transformer's maps {where} where things are: three components separate things from the ground with an area "
        f"under the curve of {span(dit, lambda value: number(value, 2))} over its blocks, "
        f"the U-Net's {listed([f'{block} with {number(value, 2)}' for block, value in unet.items()])} "
        f"(t = {steps[0]}).",
        [
            "Principal components of the maps, computed over all pictures together. 0.5 is chance, 1 is perfect; the "
            "last column is the share of the variance in the three components.",
            table(("layer", *(f"t = {step}" for step in steps), "share of variance"), cells),
            *[Picture(path, "First three principal components as red, green and blue, over all pictures together: the "
                      "same colour means similar features in every picture. Look for layers in which the things stand "
                      "out from the ground.") for path in run.pictures("jointly")],
        ],
    )  # fmt: skip


def _diffc(run: FinishedRun) -> pd.DataFrame:
    rows = with_block_and_timestep(run.table("accuracy", *COLUMNS))
    return rows[rows["classifier"] == "diffc"]


def _best(rows: pd.DataFrame) -> pd.Series:
    return rows.loc[rows["validation"].idxmax()]


def _accuracy(row: pd.Series, *, layer: bool = True) -> str:
    where = f", `{row['layer']}`" if layer and "layer" in row else ""
    return f"{percent(row['accuracy'])} ({percent_between(row['low'], row['high'])}){where}"


WORLD = (
    "the embedded models on scenes of the world, whose factors are the classes; Diff-C is narrower than the paper's."
)
SECTION = Section(
    "Paper 4: what layers and timesteps know",
    "\"Revelio: Interpreting and leveraging semantic information in diffusion models\" (Kim et al.) asks which layer "
    "and timestep of a denoiser encodes what, by classifiers of the layer's features and by features of autoencoders.",
    (
        Entry(
            "Figures 4 and 6, all layers and timesteps: probe and Diff-C", ("42_diffc/full",), knowledge,
            optional=("41_label_purity/full",),
            paper="Diff-C of Stable Diffusion 1.5's layers; up_ft1 at t = 25 is best on fine-grained data.",
            differs=WORLD, paper_runs=("42_diffc/paper-pets-sd15", "42_diffc/paper-aircraft-sd15"), headline=True,
        ),
        Entry("Tables 6 to 8 and Figure 4, by layer: accuracy of Diff-C", ("42_diffc/full",), layers,
              paper="FGVC-Aircraft, Oxford-IIIT Pets and Caltech-101, Stable Diffusion 1.5.",
              differs=f"{WORLD} Numbers of different classes cannot be compared, the order of layers can."),
        Entry("Tables 6 to 8 and Figure 6, by timestep: accuracy of Diff-C", ("42_diffc/full",), timesteps,
              paper="low noise is best on fine-grained data (Pets, Aircraft), t = 200 on Caltech-101.",
              differs=f"{WORLD} Numbers of different classes cannot be compared, the order of timesteps can."),
        Entry(
            "Table 2: label purity", ("41_label_purity/full",), purity,
            paper="the lowest sigma_label is at up_ft1 on Pets, and at the bottleneck on Caltech-101 and ImageNet.",
            differs=f"{WORLD} Class numbers run to another maximum, so sigma_label has another scale.",
            paper_runs=("41_label_purity/paper-pets-sd15", "41_label_purity/paper-caltech-sd15",
                        "41_label_purity/paper-pets-dit"),
        ),
        Entry("Table 1: how fine patterns are", ("36_annotate_features/full",), granularity,
              paper="GPT-4o's answers on Pets: the features of up_ft1 are the most fine-grained ones.",
              differs="features of the embedded model while it draws; the factors of the scenes answer, not a vision-"
              "language model."),
        Entry("Figures 1 to 3, 5, 7 and 14: pictures that activate a feature", ("41_label_purity/full",), features,
              paper="chosen features of Pets and Caltech-101; at the bottleneck they share a position, at up_ft1 a "
                    "breed.",
              differs=f"{WORLD} Features are drawn at random, not chosen."),
        Entry("Table 3: U-Net beside transformer", ("42_diffc/full", "42_diffc/full-dit"), architectures,
              paper="up_ft1 of Stable Diffusion 1.5 and block 14 of a DiT are best.", differs=WORLD),
        Entry(
            "Table 5: the denoiser itself as a classifier", ("42_diffc/full",), zero_shot,
            optional=("42_diffc/full-zero-shot",),
            paper="Diff-C is more accurate than the diffusion classifier and takes less time.",
            differs=f"{WORLD} The diffusion classifier gets fewer noise levels than the paper's.",
            paper_runs=("42_diffc/paper-pets-clip",), headline=True,
        ),
        Entry("Figures 10 to 12: principal components of maps", ("43_pca_maps/full",), maps,
              paper="a DiT's maps are blended throughout; Stable Diffusion's show what is where. Judged by eye, on "
                    "UnRel.",
              differs="pictures of the world, which show one thing on a plain pattern, and a number instead of an eye.",
              paper_runs=("43_pca_maps/paper-sd15-dit",), headline=True),
        Entry("Photographs: beyond the paper", ("42_diffc/cifar10",), cifar, optional=("41_label_purity/cifar10",)),
    ),
    (
        Absent("Table 14", "GPT-4o's prompt", why="our own words: `vaelab.sae.granularity`"),
        Absent("Table 2c, Figure 7", "Stable Diffusion 2.1 beside 1.5", why="no params file for 2.1"),
        Absent("Tables 6 to 8, prompts from CLIP", "accuracy with CLIP-inferred prompts", "42_diffc/paper-pets-clip"),
        Absent("Table 9", "a generic prompt beside none", "42_diffc/paper-pets-generic"),
        Absent("Figure 8", "DeepFloyd-IF", why="the lab does not load pixel-space models"),
        Absent("Figures 9 and 13, Table 13", "a DiT's features at two resolutions", "41_label_purity/paper-pets-dit"),
        Absent("Table 10", "the architecture of Diff-C", why="the same four convolutions: `vaelab.probing.diffc`"),
        Absent("Tables 4, 11 and 12", "visual reasoning with LLaVA", "44_visual_reasoning/full"),
    ),
)  # fmt: skip
