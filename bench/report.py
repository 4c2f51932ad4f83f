"""What a run found, as JSON for programs, and as a table and plots for people."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from bench.harness import Latency, RowResult, Sample, median_of

JSON_FILE, PAGE = "results.json", "README.md"
_INK, _OTHERS = "#20639b", "#b0b7bf"
_NUMBERS = ("rate", "cpu", "p50", "p95", "p99", "max")


def load(folder: Path) -> dict[str, Any]:
    """The rows of the last run in a folder, none if there was none."""
    file = folder / JSON_FILE
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    return rows


def row(result: RowResult, commit: str, load_before: Sequence[float], seconds: float) -> dict[str, Any]:
    """A row as JSON has it."""
    return {
        **dataclasses.asdict(result),
        "commit": commit,
        "load_average_before": [*load_before],
        "seconds": round(seconds, 1),
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write all that there is so far. ``results`` has ``environment``, ``options`` and ``rows``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = dict(sorted(results["rows"].items(), key=lambda item: int(item[0].split(",")[0])))
    targets = [target for each in rows.values() for target in each["targets"]]
    whole = {"targets": targets, **results, "rows": rows}
    (folder / JSON_FILE).write_text(json.dumps(whole, indent=1) + "\n")
    plots = {key: _plots(folder, key, each) for key, each in rows.items()}
    (folder / PAGE).write_text(_page(whole, plots))


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """The environment, as Markdown."""
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    lines = [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
        f"- Load average at the start: {load}",
        f"- {machine['date']}",
        f"- Python {machine['python']}; {libraries}; Java: {machine['java']}; Node: {machine['node']}",
    ]
    for name in ("kafka", "mongodb"):
        if (told := machine.get(name)) is not None:
            settings = ", ".join(f"{key} {value}" for key, value in told.items() if key != "version")
            lines.append(
                f"- {name.replace('kafka', 'Kafka').replace('mongodb', 'MongoDB')} {told['version']}: {settings}"
            )
    return lines


def _page(results: Mapping[str, Any], plots: Mapping[str, Sequence[str]]) -> str:
    machine, options = results["environment"], results["options"]
    parts = ["# Benchmarks", ""]
    if options["quick"]:
        parts += ["**A quick run: it shows that everything runs. Its numbers mean nothing.**", ""]
    parts += [
        "Made by `make bench`; [results.json](results.json) has every sample. All processes, Kafka, MongoDB and the",
        "load generator share the cores of one machine, so ratios say more than numbers: what is compared ran in",
        f"turns (A B C, A B C, …), {options['rounds']} time(s), on the same servers where a row does not say",
        "otherwise.",
        "",
        *machine_lines(machine),
        "",
        "## Targets",
        "",
        "| # | what | target | measured | met |",
        "|---|---|---|---|---|",
    ]
    parts += [
        f"| {t['number']} | {_cell(t['what'])} | {_cell(t['target'])} | {_cell(t['measured'])} "
        f"| {'yes' if t['met'] else '**no**'} |"
        for t in results["targets"]
    ]
    parts += [
        "",
        "[limits.md](limits.md) is about those not met: where the time goes, what was tried, what the limit is.",
        "",
        "## How to read it",
        "",
        "- Medians; least and most in brackets. A ratio is taken round by round, then its median.",
        "- *CPU s per 1,000* are the CPU seconds of the service's own processes (for ours: gateway, ingestor and",
        "  projector, until everything written can be read). Kafka, MongoDB and the generator are not in it.",
        "- Throughput is from wrk: so many callers, each waits for its answer. Latency is from vegeta, which begins so",
        "  many requests a second whatever became of those before (no coordinated omission), where a row does not say",
        "  otherwise.",
        "- The generator runs on the same cores; `generator_cores` is what it took of them.",
    ]
    for key, each in results["rows"].items():
        parts += ["", f"## Row {key}", "", *_samples(each)]
        parts += [line for name in plots.get(key, ()) for line in ("", f"![Row {key}]({name})")]
        parts += ["", *(f"- {note}" for note in each["notes"])] if each["notes"] else []
        parts += ["", *(f"- *{name}*: {how}" for name, how in each["configuration"].items())]
        load = ", ".join(f"{value:.2f}" for value in each["load_average_before"])
        parts += ["", f"Commit {each['commit']}. Took {each['seconds']:.0f} s; load average before it: {load}."]
    return "\n".join(parts).rstrip() + "\n"


def _samples(each: Mapping[str, Any]) -> list[str]:
    samples = {name: [_sample(one) for one in given] for name, given in each["samples"].items() if given}
    if not samples:
        return ["Not measured."]
    extras = [*dict.fromkeys(key for given in samples.values() for one in given for key in one.extra)]
    shown = [key for key in (*_NUMBERS, *extras) if any(_spread(given, key) for given in samples.values())]
    heads = {"rate": f"{each['unit']}/s", "cpu": "CPU s per 1,000"} | {key: f"{key} ms" for key in _NUMBERS[2:]}
    lines = ["| | " + " | ".join(heads.get(key, key.replace("_", " ")) for key in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    lines += [
        f"| {name} | " + " | ".join(_spread(given, key) for key in shown) + " |" for name, given in samples.items()
    ]
    return lines


def _sample(stored: Mapping[str, Any]) -> Sample:
    latency = stored["latency"]
    return Sample(stored["rate"], stored["cpu"], None if latency is None else Latency(**latency), stored["extra"])


def _spread(samples: Sequence[Sample], key: str) -> str:
    try:
        found = median_of(samples, key)
    except ValueError:
        return ""
    if key in _NUMBERS[2:]:
        return type(found)(found.median * 1e3, found.min * 1e3, found.max * 1e3).text(",.1f")
    return found.text({"rate": ",.0f", "cpu": ",.3f"}.get(key, ",.4g"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _plots(folder: Path, key: str, each: Mapping[str, Any]) -> list[str]:
    """Draw a row: how much, and how long it took. The files' names."""
    samples = {name: [_sample(one) for one in given] for name, given in each["samples"].items() if given}
    if not samples:
        return []
    name = f"row-{key.replace(',', '-')}"
    title = f"Row {key}"
    made = [_rates(folder / f"{name}.png", title, each["unit"], samples)]
    if timed := {who: given for who, given in samples.items() if any(one.latency for one in given)}:
        made.append(_latencies(folder / f"{name}-latency.png", title, timed))
    return made


def _rates(file: Path, title: str, unit: str, samples: Mapping[str, Sequence[Sample]]) -> str:
    figure, axes = _figure(len(samples))
    names, spreads = [*samples], [median_of(given) for given in samples.values()]
    axes.barh(
        names,
        [each.median for each in spreads],
        xerr=[[each.median - each.min for each in spreads], [each.max - each.median for each in spreads]],
        color=[_INK if name == names[0] or name.startswith("ours") else _OTHERS for name in names],
        ecolor="#555555",
        capsize=3,
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} a second: median, least to most")
    axes.set_title(title, loc="left")
    return _saved(figure, file)


def _latencies(file: Path, title: str, samples: Mapping[str, Sequence[Sample]]) -> str:
    figure, axes = _figure(len(samples) + 1)
    for number, given in enumerate(samples.values()):
        marks = zip(("p50", "p95", "p99", "max"), ("o", "s", "D", "|"), strict=True)
        for part, mark in marks:
            found = median_of(given, part)
            label = part if number == 0 else None
            axes.plot([found.min * 1e3, found.max * 1e3], [number, number], color="#dddddd", linewidth=3, zorder=1)
            axes.plot(found.median * 1e3, number, mark, color=_INK, markersize=7, label=label)
    axes.set_yticks(range(len(samples)), [*samples])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("milliseconds: medians of p50 ●, p95 ■, p99 ◆, max |; grey is least to most")
    axes.set_title(f"{title}: latency", loc="left")
    return _saved(figure, file)


def _figure(bars: int) -> tuple[Any, Any]:
    figure = Figure(figsize=(8, 1.2 + 0.45 * bars), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure: Any, file: Path) -> str:
    figure.savefig(file, metadata={"Software": None})
    return file.name
