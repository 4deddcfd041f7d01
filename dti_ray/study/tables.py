"""The tables of a study's report, in Markdown.

Stage: study, below its report. In: `Comparison`, `Cost`s, names of rows. Out: tables as text.
Invariant: a table has at most nine columns; its rows stand in the order in which the study names them; a row that has
not ended is left out here and named under "What is not there yet".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dti_ray.config.study import StudyConfig
from dti_ray.study.compare import PROTOCOLS, Asked, Comparison, Quality
from dti_ray.study.cost import Cost
from dti_ray.study.promises import Choice, planned_seeds
from dti_ray.study.results import StudyResults
from dti_ray.study.words import DASH, TIMES, count, estimate_text, gap_text, number, table, times


def split_of(study: StudyConfig, compared: Comparison, rows: Sequence[str]) -> str:
    """Return test where all rows are final and those that have ended were evaluated there, otherwise valid."""
    ended = [row for row in rows if compared.main_context(row) is not None]
    is_tested = bool(ended) and all(compared.main(row, "test") for row in ended)
    return "test" if is_tested and all(study.rows[row].final for row in rows) else "valid"


def speedup_head(compared: Comparison) -> str:
    """Return the head of a column that says how many times less a row takes to train than the reference."""
    return f"{TIMES} packed" if compared.is_against_window else f"{TIMES} reference"


def headline_table(compared: Comparison, costs: Mapping[str, Cost], rows: Sequence[str], split: str) -> str:
    """Return rows x protocols with gap and speed-up, each row with its main context."""
    padded = [f"{TIMES} padded"] if compared.is_against_window else []
    header = ["row", "protocol", "k", "n", "seeds", "AUC", "gap (95 %)", speedup_head(compared), *padded]
    lines = []
    for row in rows:
        for protocol in PROTOCOLS:
            one, cost = compared.main(row, split, protocol), costs.get(row)
            if one is None or cost is None:
                continue
            name = f"**{row}** (reference)" if row == compared.reference else f"**{row}**"
            speed = [times(cost.speedup_packed), *(times(cost.speedup_padded) for _ in padded)]
            lines.append([name, protocol, f"{one.k}", f"{one.asked.n}", _seeds(one), _auc(one), _gap(one), *speed])
    return table(header, lines, texts=2)


def ablation_table(compared: Comparison, costs: Mapping[str, Cost], rows: Sequence[str], split: str) -> str:
    """Return rows x contexts with both protocols beside each other."""
    quality = ["AUC sliding", "gap (95 %)", "AUC streaming", "gap (95 %)"]
    header = ["row", "k", "n", "seeds", *quality, speedup_head(compared)]
    lines = []
    for row in rows:
        sliding, streaming = ({one.asked.n: one for one in compared.of(row, split, name)} for name in PROTOCOLS)
        for n in sorted(sliding.keys() | streaming.keys()):
            pair = [sliding.get(n), streaming.get(n)]
            known = next(one for one in pair if one is not None)
            cells = [text for one in pair for text in ((_auc(one), _gap(one)) if one else (DASH, DASH))]
            cost = costs.get(row)
            speed = times(cost.speedup_packed if cost else None)
            lines.append([f"`{row}`", f"{known.k}", f"{n}", _seeds(known), *cells, speed])
    return table(header, lines)


def protocols_table(compared: Comparison, rows: Sequence[str], split: str) -> str:
    """Return what each row gains under streaming inference, and what both protocols cost."""
    header = ["row", "n", "AUC sliding", "AUC streaming", "difference (95 %)", "s / M sliding", "s / M streaming"]
    lines = []
    for row in rows:
        for one in compared.of(row, split, "sliding"):
            other = compared.qualities.get(one.asked._replace(protocol="streaming"))
            gap = compared.streaming.get(one.asked)
            if other is None or gap is None:
                continue
            seconds = [count(side.seconds_per_million) for side in (one, other)]
            lines.append([f"`{row}`", f"{one.asked.n}", _auc(one), _auc(other), gap_text(gap), *seconds])
    return table(header, lines)


def seeds_table(compared: Comparison, rows: Iterable[str], split: str) -> str:
    """Return what single seeds reached, with the context that a row has first."""
    header = ["row", "protocol", "n", "AUC of each seed", "sd", "sd of the gap", "log loss", "GAUC"]
    lines = []
    for row in rows:
        for protocol in PROTOCOLS:
            one = compared.main(row, split, protocol)
            if one is None:
                continue
            each = ", ".join(map(number, one.auc_by_seed))
            sds = [number(one.auc_sd), number(one.gap.sd if one.gap else None)]
            lines.append([f"`{row}`", protocol, f"{one.asked.n}", each, *sds, number(one.log_loss), number(one.gauc)])
    return table(header, lines, texts=2)


def costs_table(compared: Comparison, costs: Mapping[str, Cost]) -> str:
    """Return what training each row costs."""
    per_target = ["s / M", "tokens / target", "FLOP / target"]
    fewer = [f"{TIMES} fewer tokens", f"{TIMES} fewer FLOPs"]
    header = ["row", "seconds (clock)", "best at", *per_target, f"{speedup_head(compared)} (clock)", *fewer]
    return table(
        header,
        [
            [
                f"`{name}`",
                f"{count(cost.seconds)} ({count(cost.elapsed_seconds)})",
                f"{100 * cost.best_targets / cost.targets:.0f} %",
                count(cost.seconds_per_million),
                f"{cost.tokens_per_million / 1e6:.2f}",
                count(cost.flops_per_target),
                f"{times(cost.speedup_packed)} ({times(cost.speedup_elapsed)})",
                times(cost.token_ratio),
                times(cost.flop_ratio),
            ]
            for name, cost in costs.items()
        ],
    )


def choices_table(choices: Mapping[str, Choice], costs: Mapping[str, Cost]) -> str:
    """Return the best configuration under each protocol, and what it costs."""
    prices = ["training s / M", "training tokens / M", "inference s / M"]
    header = ["protocol", "row", "n", "validation AUC", "test AUC (95 %)", *prices]
    lines = []
    for protocol, choice in choices.items():
        one, cost = choice.valid, costs[choice.valid.asked.row]
        test = estimate_text(choice.test.auc) if choice.test else "not touched"
        price = [count(cost.seconds_per_million), count(cost.tokens_per_million), count(one.seconds_per_million)]
        lines.append([f"**{protocol}**", f"`{one.asked.row}`", f"{one.asked.n}", _auc(one), test, *price])
    return table(header, lines, texts=2)


def classics_table(results: StudyResults, compared: Comparison, split: str) -> str:
    """Return the baselines on one split, and how the default lies to each."""
    told = [one for one in compared.classics if one.split == split]
    asked = list(dict.fromkeys(key for one in told for key in one.default))
    seconds = {one.name: one.seconds for one in results.classics}
    columns = [f"default, {protocol}, n = {n}" for protocol, n in asked]
    lines = []
    for one in told:
        scores = [estimate_text(one.auc), number(one.log_loss), number(one.gauc), count(seconds[one.name])]
        lines.append([one.name, *scores, *(gap_text(one.default.get(key)) for key in asked)])
    default = results.study.default or ""
    for protocol, n in asked:
        of = compared.qualities[Asked(split, default, protocol, n)]
        scores = [estimate_text(of.auc), number(of.log_loss), number(of.gauc), DASH]
        lines.append([f"**{default}**, {protocol}, n = {n}", *scores, *(DASH for _ in asked)])
    return table(["", "AUC (95 %)", "log loss", "GAUC", "fit (s)", *columns], lines)


def reruns_table(results: StudyResults, compared: Comparison) -> str:
    """Return what the study's command needs for each row, and where the AUC of a rerun lies."""
    lines = []
    for row in results.study.rows:
        split = "test" if results.study.rows[row].final and compared.main(row, "test") else "valid"
        one = compared.main(row, split)
        if one is None:
            continue
        seed = planned_seeds(results.study, row)[0]
        low_high = f"{number(one.rerun[0])} to {number(one.rerun[1])}" if one.rerun else DASH
        lines.append([f"`--row {row} --seed {seed}`", split, f"{one.asked.n}", _auc(one), low_high])
    return table(["arguments", "split", "n", "AUC sliding", "a rerun lies within (95 %)"], lines, texts=2)


def contexts_rows(compared: Comparison) -> list[str]:
    """Return the rows that were asked with several contexts."""
    contexts: dict[str, set[int]] = {}
    for asked in compared.qualities:
        contexts.setdefault(asked.row, set()).add(asked.n)
    return [row for row, found in contexts.items() if len(found) > 1]


def _seeds(one: Quality) -> str:
    """Write the number of seeds, and of those that the gap rests on where it is another."""
    is_same = one.gap is None or one.gap.seeds == len(one.seeds)
    return f"{len(one.seeds)}" if is_same or one.gap is None else f"{len(one.seeds)} (gap: {one.gap.seeds})"


def _auc(one: Quality) -> str:
    return number(one.auc.value)


def _gap(one: Quality) -> str:
    return gap_text(one.gap)
