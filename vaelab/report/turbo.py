"""The results page on "Unpacking SDXL Turbo: Interpreting Text-to-Image Models with Sparse Autoencoders" (Surkov et
al.)."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from vaelab import viz
from vaelab.core.stats import wilson
from vaelab.report.markdown import Chart, Picture, listed, number, percent, percent_between, span, table
from vaelab.report.models import FACTORS
from vaelab.report.page import Absent, Entry, Section, Shown
from vaelab.report.runs import FinishedRun
from vaelab.sae import truth_plots
from vaelab.sae.interventions import PAPER_TABLE_2, PAPER_WIDTH
from vaelab.sae.steering_plots import effect_against_damage
from vaelab.sae.steering_scores import ALL_BLOCKS, MEASURES, PROMPT, change_sentence, find_or_change
from vaelab.sae.truth import verdict, worth_sentence
from vaelab.sae.truth_plots import LABELS

STRONG = 0.1
"""A block matters for a factor where switching it off costs so much accuracy."""
ENDS = ("", "_low", "_high")
CAPTIONS = 5
"""Captions of a block that are listed."""
F1, AHEAD = ("f1", "f1_low", "f1_high"), ("ahead", "ahead_low", "ahead_high")
"""Columns of tables of features against the truth."""
METHODS = {
    "sae": "the autoencoder",
    "pca": "as many principal components",
    "random": "a random dictionary, same top-k",
    "mean": "its mean",
    "zero": "zero",
}


def figure_3(run: FinishedRun) -> Shown:
    """Show what is lost when one block's update is switched off."""
    effects = run.table("blocks", "block", "manhattan", *FACTORS).set_index("block")
    factors = list(FACTORS[:-1])
    worst = effects[factors].min(axis=1)
    strong = [block for block in effects.index if worst[block] <= -STRONG]
    weak = effects.drop(strong)[factors]
    owners = [
        f"{factor} on `{effects[factor].idxmin()}` ({100 * effects[factor].min():+.0f} points)" for factor in factors
    ]
    rest = f" Of the other {len(weak)}, none costs more than {-100 * weak.min().min():.0f} points." if len(weak) else ""
    ordered = effects.loc[strong, [*factors, "manhattan"]]
    rows = [(f"`{block}`", *(f"{100 * row[factor]:+.0f}" for factor in factors), number(row["manhattan"]))
            for block, row in ordered.iterrows()]  # fmt: skip
    return Shown(
        f"{len(strong)} of {len(effects)} blocks do the drawing: {listed([f'`{block}`' for block in strong])}.{rest}",
        [
            "A block's **update** is what it adds to its input. It is set to zero at every step, and the table shows "
            f"the change of the share of pictures with the factor correct, in points, over {run.params['max_images']} "
            "prompts; the last column is the mean change of a pixel, of at most 765. Each factor depends most on one "
            f"block: {listed(owners)}.",
            table(("without", *factors, "change of a pixel"), rows),
            Chart("blocks", lambda: viz.matrix(effects[factors], "change of accuracy", "without the block's update",
                                               diverging=True),
                  "Change of the share of pictures with the factor correct, without each block's update; the "
                  "darker the blue, the more is lost."),
            *_pictures(run, "pictures", "The same prompts without each block in turn."),
        ],
    )  # fmt: skip


def table_2(collected: FinishedRun, trained: FinishedRun) -> Shown:
    """Show how much of an update's variance k features explain, beside the paper's."""
    widths = collected.table("blocks", "block", "width").set_index("block")["width"]
    means = trained.table("sizes", "block", "k", "n_features", "explained_variance", "dead_fraction")
    blocks, rows = list(dict.fromkeys(means["block"])), []
    for (k, size), part in means.groupby(["k", "n_features"]):
        own = part.set_index("block")
        ratio = size / widths[blocks[0]]
        paper = [values[3] for (_, *key), values in PAPER_TABLE_2.items() if key == [k, round(ratio * PAPER_WIDTH)]]
        cells = [f"{percent(own.loc[block, 'explained_variance'], 1)} ({percent(own.loc[block, 'dead_fraction'])})"
                 for block in blocks]  # fmt: skip
        rows.append((k, f"{ratio:g} d", span(paper, "{:.0f} %".format) if paper else "", *cells))
    explained = means.groupby(["n_features", "k"])["explained_variance"].mean().unstack()
    larger_k = explained.iloc[:, -1] - explained.iloc[:, 0]
    larger_size = explained.iloc[-1] - explained.iloc[0]
    more = (larger_k > 0).all() and (larger_size > 0).all()
    stronger = "a larger k" if larger_k.mean() > larger_size.mean() else "a larger dictionary"
    return Shown(
        ("As in the paper, more active features and larger dictionaries explain more" if more
         else "Unlike in the paper, more features do not always explain more")
        + f": {span(means['explained_variance'], percent)} of an update's variance; {stronger} helps most. "
        f"{span(means['dead_fraction'], percent)} of the features are dead.",
        [
            "A sparse autoencoder (**SAE**) writes an update as a sum of **k** of its features, of which it has **n**; "
            "d is the update's width. A feature is **dead** where no held-out vector activates it. Explained variance "
            "on held-out prompts, in brackets the dead features; the paper's column is the range of its four blocks.",
            table(("k", "n", "paper", *(f"here, `{block}`" for block in blocks)), rows),
        ],
    )  # fmt: skip


def replaced(run: FinishedRun) -> Shown:
    """Show what a picture loses when an update is replaced by its reconstruction."""
    size = (run.params["k"], run.params["n_features"])
    rows = run.table("table2", "block", "method", "k", "n_features", "manhattan_mean", "manhattan_median",
                     "oracle_agreement", "explained_variance")  # fmt: skip
    own = rows[(rows["k"] == size[0]) & (rows["n_features"] == size[1])].set_index(["method", "block"])
    blocks, count = list(dict.fromkeys(rows["block"])), int(run.metric("prompts"))
    cells = [
        (METHODS[method], *(_replaced(own.loc[(method, block)], count) for block in blocks))
        for method in METHODS
        if method in own.index.get_level_values("method")
    ]
    distances = own["manhattan_mean"].unstack("block")
    agreement, explained = own["oracle_agreement"].unstack("block"), own["explained_variance"].unstack("block")
    quotients = distances.loc["zero"] / distances.loc["sae"]
    equalled = [f"`{block}`" for block in blocks if agreement.loc["pca", block] >= agreement.loc["sae", block]]
    last = _last_step(run, blocks)
    return Shown(
        f"With the autoencoder in place of the update the pixels move {span(quotients, lambda q: number(q, 2))} times "
        f"less than without the update, and {span(agreement.loc['sae'], percent)} of the pictures show the same scene. "
        + (f"But as many principal components preserve as many scenes or more in {listed(equalled)}."
           if equalled else "It preserves more scenes than as many principal components in every block."),
        [
            f"k = {size[0]}, n = {size[1]}, {count} prompts. Cells: mean / median change of a pixel (of at most 765), "
            "the share of pictures in which the oracle still reads the same scene with its 95 % interval, and the "
            "explained variance.",
            table(("update replaced by", *(f"`{block}`" for block in blocks)), cells),
            f"A random dictionary explains {span(explained.loc['random'], percent)} of the variance and still "
            f"preserves {span(agreement.loc['random'], percent)} of the scenes, so neither number means much without "
            f"such a comparison. {last}",
        ],
    )  # fmt: skip


def figure_4(run: FinishedRun) -> Shown:
    """Show pictures with the update replaced."""
    pictures = run.pictures("pictures-*")[-1:]
    block = pictures[0].stem.removeprefix("pictures-") if pictures else ""
    return Shown(
        "",
        [Picture(path, f"Rows: the original, then the update of {block} replaced by each method. A good reconstruction "
                 "looks like the first row; zero and the mean show what the block does.") for path in pictures],
    )  # fmt: skip


def scored_features(run: FinishedRun) -> Shown:
    """Show the scores of the paper's Table 1 beside their controls."""
    scores = run.table("table1").fillna("")
    names = [name for name in scores if name not in ("block", "who")]
    rows = [(f"`{row['block']}`" if row["block"] else "", row["who"], *(row[name] for name in names))
            for row in scores.to_dict("records")]  # fmt: skip
    encoders = f"{run.params['picture_model']} (pictures) and {run.params['sentence_model']} (sentences)"
    return Shown(run.results["finding"], [
        f"{run.params['scored_features']} features of each block, chosen at random, so differences between rows are "
        "hints; mean (standard deviation) over features or samples. Similarities are those of "
        f"{encoders}. `specificity`: similarity of a feature's top pictures to each other. `monosemanticity`: "
        "similarity of all pictures, weighted by activation. `colour`: distance of the feature's pixels from their "
        "mean colour. `texture`, `causality`: similarity of the picture that the feature draws alone to textures, and "
        "to its top pictures. `active > x`: share of the prompts near the feature's words / of all prompts whose "
        "pictures have it on more of their area. `beta`: change of a pixel, summed over red, green and blue (0 to "
        "765), inside / outside the feature's active area when it is turned up or down by beta. A score that a control "
        "reaches too says nothing about the feature.",
        table(("block", "features", *names), rows),
    ])  # fmt: skip


def gallery(run: FinishedRun) -> Shown:
    """Show features by heat map, modulated, alone, on their top pictures and in other pictures."""
    captions = {
        "prompt-*": "The most active features on one prompt. hmap: where the feature is active; A: turned down and up; "
        "B: the feature alone on the empty prompt; C: its top pictures.",
        "features-*": "Features on their own top pictures, and alone on the empty prompt with three strengths.",
        "turned-on-*": "The same features in unrelated pictures: turned on everywhere, and only inside a box.",
    }
    return Shown("", [Picture(path, text) for name, text in captions.items() for path in run.pictures(name)[-1:]])


def captions(run: FinishedRun) -> Shown:
    """Show how well captions tell active from inactive pictures, and the first captions of each block."""
    scores = run.table("scores", "block", "who", "mean", "low", "high")
    scores["text"] = [f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in scores.to_dict("records")]
    wide = scores.pivot(index="block", columns="who", values="text")[list(dict.fromkeys(scores["who"]))]
    named = run.table("captions", "block", "feature", "caption", "score", "words", "words_score")
    first = named.groupby("block", sort=False).head(CAPTIONS)
    rows = [
        (f"`{row['block']}`", row["feature"], row["caption"] or "none", _auroc(row["score"]), row["words"],
         _auroc(row["words_score"])) for row in first.to_dict("records")
    ]  # fmt: skip
    return Shown(run.results["finding"], [
        f"Each of {len(named)} features, chosen at random, is named by the factor value that it finds best on one half "
        f"of {run.params['pool']} pictures. The score is the AUROC with which the name tells the pictures of the other "
        "half in which the feature is strongest from those in which it is inactive; 0.5 is chance. Mean over features, "
        "with its 95 % interval:",
        table(("block", *wide), [(f"`{block}`", *row) for block, row in zip(wide.index, wide.values, strict=True)]),
        "The first captions of each block, and the three words whose prompts activate the feature most. The words were "
        "counted over all prompts, the held-out ones too.",
        table(("block", "feature", "caption", "score", "words", "score of the words"), rows),
        *_pictures(run, "shown-*", "What a vision-language model would be shown of this feature: pictures without it, "
                   "pictures with rising activation, and the strongest; masked, what is left where it is active.")[:1],
    ])  # fmt: skip


def positive_controls(run: FinishedRun) -> Shown:
    """Show how well features find what was planted, and factors where the update has few dimensions."""
    panels, blocks, sentences = {}, [], []
    for name, title in (("planted", "planted directions"), ("projected", "factors, the update projected")):
        if name not in run.results["tables"]:
            continue
        panels[title] = run.table(name, "concepts_per_dimension", "method", *F1, *AHEAD).sort_values(
            "concepts_per_dimension", kind="stable"
        )
        sentences.append(f"{title}: {worth_sentence(panels[title])}")
        blocks += [f"F1 of the best feature, {title}, by the number of concepts for each dimension of the update:",
                   _f1_table(panels[title], "concepts_per_dimension", "{:.3g} a dimension".format)]  # fmt: skip
    soft = _soft_frozen(panels["planted directions"]) if "planted directions" in panels else ""
    finding = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    chart = Chart("density", lambda: truth_plots.against_density(panels),
                  "F1 of the best feature against the number of concepts per dimension. A trained autoencoder is worth "
                  "its cost where its line lies above all others but the probe's.")  # fmt: skip
    return Shown(finding, [
        "A benchmark on which an autoencoder cannot win says nothing when it loses. So known directions are added to "
        "the update, more than it has dimensions, and the update itself is projected to fewer dimensions than there "
        "are factor values. A *frozen* decoder or encoder stays random while the rest is trained; the rows of a "
        f"*soft-frozen* decoder may turn little, so it shows how much of a result needs learned directions.{soft}",
        *blocks, chart,
    ])  # fmt: skip


def _soft_frozen(planted: pd.DataFrame) -> str:
    """How near the soft-frozen decoder comes to the trained autoencoder at the largest number of planted directions."""
    rows = planted[planted["method"] == "soft_frozen"]
    if rows.empty:
        return ""
    last = rows.iloc[-1]
    return (f" At {last['concepts_per_dimension']:.2g} planted directions a dimension the trained autoencoder is ahead "
            f"of it by {last['ahead']:.2f} ({last['ahead_low']:.2f} to {last['ahead_high']:.2f}).")  # fmt: skip


def truth(run: FinishedRun) -> Shown:
    """Show how well single features find the factors of the world, by where the features come from."""
    rows = run.table("truth", "block", "method", *F1, *AHEAD, "iou", "coverage", "auroc")
    blocks = list(dict.fromkeys(rows["block"]))
    means = rows.groupby("method", sort=False)[["auroc", "iou", "coverage"]].mean()
    stable = [(f"`{block}`", number(run.metric(f"{block}.stability"), 2),
               number(run.metric(f"{block}.stability.untrained"), 2),
               number(run.metric(f"{block}.stability.correlation"), 2))
              for block in blocks if f"{block}.stability" in run.results["metrics"]]  # fmt: skip
    return Shown(verdict(rows, "block"), [
        "For every value of a factor, such as red or top left, the best feature and its threshold are chosen on one "
        "half of the scenes and scored on the other. F1 per patch, mean over all values, with intervals over scenes "
        "and seeds. A method is ahead or behind where the interval of the difference, on the same scenes, excludes 0. "
        "The difference of means and the linear probe know the labels; the probe is the ceiling.",
        _f1_table(rows, "block", "`{}`".format),
        "Area under the curve, overlap of the feature's map with the thing's mask (intersection over union), and the "
        "share of values found with an F1 above 0.8, mean over the blocks:",
        table(("features", "AUROC", "IoU", "coverage"),
              [(LABELS.get(method, method), number(row["auroc"], 2), number(row["iou"], 2), percent(row["coverage"]))
               for method, row in means.iterrows()]),
        *(["Are features found again, and do those detect better? Mean cosine of features of different seeds, "
           "matched one to one; the same without training; and the rank correlation of a feature's cosine with the "
           "gain of its F1 over marking every patch:",
           table(("block", "trained", "untrained", "correlation with the gain in F1"), stable)] if stable else []),
    ])  # fmt: skip


def steered(scores: FinishedRun, run: FinishedRun) -> Shown:
    """Show how often directions change a factor of the pictures, at what cost, and whether those that find one do."""
    rows = run.table("steering", "block", "direction", "way", *(f"{name}{end}" for name in MEASURES for end in ENDS))
    curve = run.table("steering_curve", "block", "direction", "way", "strength", *MEASURES)
    found = scores.table("truth", "block", "method", *F1, "coverage")
    blocks = list(dict.fromkeys(curve["block"]))
    together = rows[rows["block"] == (ALL_BLOCKS if len(blocks) > 1 else blocks[0])]
    cells = [(row["way"], LABELS.get(row["direction"], "the prompt that names it"),
              *(_interval(row, name) for name in MEASURES)) for row in together.to_dict("records")]  # fmt: skip
    compared = []
    for block in blocks:
        both = find_or_change(found[found["block"] == block], rows[rows["block"] == block])
        compared += [(f"`{block}`", LABELS[row["method"]], number(row["f1"], 2), row["way"],
                      *(number(row[name], 2) for name in ("effect", "selectivity", "damage")))
                     for row in both.dropna(subset=["f1", "effect"]).to_dict("records")]  # fmt: skip
    charts = [
        Chart(f"steering-{block}",
              lambda own=own: effect_against_damage(own, own[own["direction"] == PROMPT]),
              f"`{block}`: effect and selectivity against damage, by strength. Up and to the left is "
              "better; the star is the prompt.")
        for block, own in curve.groupby("block", sort=False)
    ]  # fmt: skip
    return Shown(change_sentence(rows), [
        f"From prompts that name another value, or leave it open, a direction is written where the factor is, for "
        f"the {run.params['steered_values']} values of each block that are found best. Effect: how often the oracle "
        "then reads the value. Selectivity: the share of the other factors that stay. Damage: the denoiser's own loss "
        "on the picture, relative to pictures without steering. Distance: to the picture that a prompt with the value "
        "gives, by "
        "EfficientNet-Lite0. The best strength of each value is chosen on one half of the scenes; the numbers are of "
        "the other half, with intervals over scenes. *Add* adds the direction; *replace* first takes away what is "
        "there along it; *clamp* goes no further than the largest amount seen in the data. All blocks together:",
        table(("way", "direction", *MEASURES), cells),
        "Which to find a factor, and which to change it? F1 of the best feature beside the way of steering that does "
        "most, by block:",
        table(("block", "direction", "F1", "way", "effect", "selectivity", "damage"), compared),
        *charts,
        *[Picture(path, "One scene for each value: without steering, steered, and of the prompt that names the value.")
          for path in run.pictures("steered-*")[-1:]],
    ])  # fmt: skip


def _auroc(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value:.2f}"


def _interval(row: Mapping[str, float], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


def _f1_table(rows: pd.DataFrame, column: str, heading: Callable[[Any], str]) -> str:
    """A table of F1 with intervals: one row per method, one column for each value of a column."""
    values = list(dict.fromkeys(rows[column]))
    own = rows.set_index(["method", column])
    return table(
        ("features", *map(heading, values)),
        [
            (LABELS.get(method, method), *(_interval(own.loc[(method, value)], "f1") for value in values))
            for method in dict.fromkeys(rows["method"])
            if all((method, value) in own.index for value in values)
        ],
    )


def _replaced(row: pd.Series, count: int) -> str:
    share = row["oracle_agreement"]
    ends = percent_between(*wilson(round(share * count), count))
    return (f"{row['manhattan_mean']:.2f} / {row['manhattan_median']:.2f}; {percent(share)} ({ends}); "
            f"{percent(row['explained_variance'])}")  # fmt: skip


def _last_step(run: FinishedRun, blocks: list[str]) -> str:
    """How much of the distance arises where the update is replaced at the last step alone."""
    rows = run.table("steps", "block", "method", "step", "manhattan_mean")
    own = rows[rows["method"] == "sae"].assign(step=rows["step"].astype(str)).set_index(["block", "step"])
    last = max(step for step in own.index.get_level_values("step") if step.isdigit())
    parts = [f"{own.loc[(block, last), 'manhattan_mean']:.1f} of {own.loc[(block, 'all'), 'manhattan_mean']:.1f}"
             for block in blocks]  # fmt: skip
    return f"Replaced at the last step alone, the autoencoder moves the pixels by {listed(parts)}."


def _pictures(run: FinishedRun, name: str, caption: str) -> list[Picture]:
    return [Picture(path, caption) for path in run.pictures(name)]


def _paper_span(column: int) -> str:
    return span((values[column] for values in PAPER_TABLE_2.values()), lambda value: number(value, 2))


GALLERY, SCORES = "34_feature_gallery/full", "35_feature_scores/full"
SECTION = Section(
    "Paper 3: features of a text-to-image model",
    "\"Unpacking SDXL Turbo: Interpreting Text-to-Image Models with Sparse Autoencoders\" (Surkov et al.) trains "
    "sparse autoencoders on what single blocks of SDXL Turbo add to a picture in the making. Blocks have the paper's "
    "short names: `up.1.2` is the third cross-attention block of the second stage on the way up.",
    (
        Entry(
            "Figure 3: which block does what", ("33_block_ablation/full",), figure_3,
            paper="pictures without each block: `down.2.1` seems to determine the composition and `up.0.1` the "
                  "colours.",
            differs="the embedded model, which has eleven blocks of other widths; blocks of the same name need not "
            "have the same part.",
            paper_runs=("33_block_ablation/paper-sdxl-turbo",), headline=True,
        ),
        Entry(
            "Table 2, explained variance: what k features keep", ("30_collect_activations/full", "31_train_sae/full"),
            table_2,
            paper="explained variance of `down.2.1`, `mid.0`, `up.0.0` and `up.0.1`; no dead features.",
            differs="another model, other blocks, d 64 instead of 1,280; k and n / d are the paper's.",
            paper_runs=("31_train_sae/paper-sdxl-turbo-down", "31_train_sae/paper-sdxl-turbo-up"),
        ),
        Entry(
            "Table 2, distances: pictures with the update replaced", ("32_evaluate_sae/full",), replaced,
            paper=f"mean change of a pixel {_paper_span(0)}, median {_paper_span(1)}, LPIPS {_paper_span(2)}; no "
                   "baseline.",
            differs="another model's pictures, of 64 x 64: distances in pixels cannot be compared with the paper's, so "
            "baselines stand beside them. LPIPS needs a network that is not shipped.",
            paper_runs=("32_evaluate_sae/paper-sdxl-turbo-down", "32_evaluate_sae/paper-sdxl-turbo-mid",
                        "32_evaluate_sae/paper-sdxl-turbo-up0", "32_evaluate_sae/paper-sdxl-turbo-up"),
            headline=True,
        ),
        Entry("Figure 4: such pictures", ("32_evaluate_sae/full",), figure_4,
              paper="pictures of `down.2.1` replaced by its reconstruction, k = 10, n = 5,120."),
        Entry("Table 1: scores of features", (GALLERY,), scored_features,
              paper="specificity, texture, colour and locality of four blocks, beside random pictures.",
              differs="another model, and smaller networks in place of CLIP; textures are photographs that come with "
              "scikit-image.",
              paper_runs=("34_feature_gallery/paper-sdxl-turbo-down", "34_feature_gallery/paper-sdxl-turbo-up")),
        Entry("Figures 1 and 5 to 10: features in pictures", (GALLERY,), gallery),
        Entry("Table 6 and Figure 11: captions of features", ("36_annotate_features/full",), captions,
              paper="captions of `down.2.1` by GPT-4o; CLIP's similarity to top pictures 0.21, to random ones 0.12.",
              differs="features are named by factors of the world, without a vision-language model, and compared with "
              "the truth of the scene.",
              paper_runs=("36_annotate_features/paper-sdxl-turbo-down",)),
        Entry("Where autoencoders must win: beyond the paper", (SCORES,), positive_controls),
        Entry("Features against the truth: beyond the paper", (SCORES,), truth, headline=True),
        Entry("Steering against the truth: beyond the paper", (SCORES, "35_feature_scores/full-steering"), steered,
              headline=True),
    ),
    (
        Absent("Tables 3 to 5", "the prompts of the top examples in Figures 6 to 8",
               why="the prompts stand in the executed notebook `34_feature_gallery`"),
        Absent("Figure 2", "a diagram of SDXL's U-Net", why="not a result"),
        Absent("Footnote 4", "linear probes for the position", why="in the results of `34_feature_gallery`"),
    ),
)  # fmt: skip
