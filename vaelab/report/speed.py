"""The results page on speed: what tracking, collecting, storing and training cost."""

from vaelab.report.markdown import listed, number, signed, span, table
from vaelab.report.page import Entry, Section, Shown
from vaelab.report.runs import FinishedRun

SYSTEMS = {
    "float32": "here, float32",
    "bf16": "here, bfloat16 screen, float32 values",
    "sparsify": "`eai-sparsify`",
    "dense": "written densely, as the papers' code",
    "sae_lens": "`sae-lens`",
    "dictionary_learning": "`dictionary-learning`",
}
GIGABYTE = 1000


def steps(run: FinishedRun) -> Shown:
    """Show a training step of an autoencoder beside other libraries'."""
    rows = run.table("sae_steps", "system", "over_gemm", "dead")
    medians = rows.groupby(["system", "dead"])["over_gemm"].median()
    names = [name for name in dict.fromkeys(rows["system"]) if name not in ("gemm", "gemm_best")]
    metrics = run.results["metrics"]
    cells = []
    for name in names:
        peak, large = metrics.get(f"sae.large.peak_mb.{name}"), metrics.get(f"sae.large.step_over_gemm.{name}")
        cells.append((
            SYSTEMS.get(name, f"`{name}`"), number(medians[name, "none dead"]),
            number(medians[name, "512 dead"]) if (name, "512 dead") in medians.index else "",
            number(large) if large else "", f"{peak / GIGABYTE:.2f}" if peak else "",
        ))  # fmt: skip
    others = [name for name in names if name not in ("float32", "bf16", "dense")]
    quicker = [medians[name, "none dead"] / medians["float32", "none dead"] for name in others]
    recovered = {name.split(".")[-1]: value for name, value in metrics.items() if name.startswith("sae.recovery.")}
    beside = (
        f"; other libraries take {span(quicker, lambda value: number(value, 2))} times as long"
        if others
        else "; no other library was installed"
    )
    return Shown(
        f"A whole training step takes {number(medians['float32', 'none dead'], 2)} times as long as the encoder's "
        f"product alone as torch computes it{beside}.",
        [
            "Forward, both losses, backward, projection and Adam at d 1,280, 5,120 features, k 10; medians of "
            "interleaved rounds, in units of the encoder's float32 product. 512 features are dead in the second "
            "column; the third has 81,920 features.",
            table(("", "nothing dead", "512 dead", "81,920 features", "its peak memory, GB"), cells),
            "A planted dictionary (512 features in 128 dimensions, 8 active) is recovered with a mean cosine of "
            + listed([f"{number(value)} ({name})" for name, value in recovered.items()])
            + f". On {100 * run.metric('sae.selection_equal_fraction'):.1f} % of the vectors of a trained autoencoder "
            "the bfloat16 screen chooses the same features as float32.",
        ],
    )  # fmt: skip


def tracking(run: FinishedRun) -> Shown:
    """Show the cost of tracking channels."""
    overhead, every = run.metric("tracking.overhead_percent"), run.params["track_every"]
    return Shown(
        f"Measuring every GroupNorm on each {every}th step adds {signed(overhead)} % to a training step.",
        [f"Two untracked steps differ by {signed(run.metric('tracking.repeat_percent'))} %, which is the noise of this "
         f"machine. The time of a tracked step alone changes by {_quartiles(run, 'tracking.tracked_step_percent')}."],
    )  # fmt: skip


def collecting(run: FinishedRun) -> Shown:
    """Show the cost of collecting activations."""
    overhead = run.metric("collect.overhead_percent")
    return Shown(
        f"Collecting the updates of {len(run.params['blocks'])} blocks takes {number(abs(overhead), 2)} % "
        f"{'less' if overhead < 0 else 'more'} time than drawing the same prompts' pictures.",
        [f"Median and quartiles {_quartiles(run, 'collect.overhead_percent')}; two runs of the same differ by "
         f"{_quartiles(run, 'collect.repeat_percent')}. Collecting needs no picture, so the pass ends after the last "
         "block."],
    )  # fmt: skip


def store(run: FinishedRun) -> Shown:
    """Show how fast activations are written and read."""
    rows = run.table("store", "system", "write", "read", "vectors")
    quartiles = rows.groupby("system", sort=False)[["write", "read"]].quantile([0.25, 0.5, 0.75]).unstack()
    cells = [
        (f"`{name}`", number(rows["vectors"].iloc[0] / quartiles.loc[name, ("read", 0.5)] / 1e6, 2),
         *(f"{number(quartiles.loc[name, (what, 0.5)], 2)} ({number(quartiles.loc[name, (what, 0.25)], 2)} to "
           f"{number(quartiles.loc[name, (what, 0.75)], 2)})" for what in ("read", "write")))
        for name in quartiles.index
    ]  # fmt: skip
    return Shown(
        f"The store reads {run.metric('store.shuffled_vectors_per_second') / 1e6:.2g} million vectors a second, "
        f"shuffled: {number(run.metric('store.read_vs_webdataset'), 2)} times as fast as a webdataset tar and "
        f"{number(run.metric('store.read_vs_arrow'), 2)} times as fast as Arrow rows.",
        [
            f"{int(rows['vectors'].iloc[0]):,} vectors of 1,280 float16 values, from the page cache; medians and "
            "quartiles of interleaved rounds.",
            table(("system", "million vectors a second", "seconds to read", "seconds to write"), cells),
        ],
    )  # fmt: skip


def sharing(run: FinishedRun) -> Shown:
    """Show what a sweep over layers and timesteps costs."""
    return Shown(
        f"A sweep of {len(run.params['blocks'])} layers and {len(run.params['timesteps'])} timesteps takes the time of "
        f"{number(run.metric('sweep.whole_passes'), 2)} whole passes a picture, "
        f"{number(run.metric('sweep.times_quicker'), 2)} times less than one layer and timestep at a time.",
        ["All layers share the pass of a timestep."],
    )


def _quartiles(run: FinishedRun, name: str) -> str:
    low, high = run.metric(f"{name}.q1"), run.metric(f"{name}.q3")
    return f"{signed(run.metric(name))} % ({signed(low)} to {signed(high)})"


SECTION = Section(
    "How fast it is",
    "Everything that is compared runs in one process or in turns, in a random order. No paper has such numbers.",
    (
        Entry("Training an autoencoder: a step beside other libraries", ("90_benchmarks/full",), steps),
        Entry("Tracking: the cost of watching channels", ("90_benchmarks/full",), tracking),
        Entry("Collecting: activations beside pictures", ("90_benchmarks/store",), collecting),
        Entry("The store: writing and reading", ("90_benchmarks/store",), store),
        Entry("A sweep: shared passes", ("40_layer_features/sweep",), sharing),
    ),
)
