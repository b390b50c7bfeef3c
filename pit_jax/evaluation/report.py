"""A run as one web page that needs no network: headline numbers, figures, tables, a browser of the test prompts.

The page must be safe to open whatever a model wrote. Text of models and users is escaped where it is HTML, has no "<"
where it is data of a script, and enters the page as text nodes. Should one of these fail, the page's
Content-Security-Policy lets no script run but the template's own, which it names by its hash, and nothing be fetched.
"""

import base64
import difflib
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pit_jax.evaluation import figures as figures_lib, tables
from pit_jax.evaluation.figures import proper

MAX_SAMPLES_BYTES = 3_500_000
"""Of all samples in the page. Where they are more, evenly spaced prompts are shown, as many as fit."""

MAX_CHARACTERS = 8_000
"""Of one answer or prompt in the page; what is longer is cut, and says so."""

_OPEN = ("comparisons", "answers", "reward_models", "missing")
_WORD = re.compile(r"(?:\w+(?:['’-]\w+)*|[^\w\s])\s*|^\s+")


def render(results: Mapping, config: Mapping, samples: Sequence[Mapping], figures: Mapping[str, str]) -> str:
    """The page.

    Args:
      results: see `tables`; "commands", what a command does -> command, is shown too.
      config: of the run, as in config.json.
      samples: one dict per test prompt: prompt, requirements [[kind, value]], answers {name: text}, and where known
        met {name: [bool]}, scores {judge: {name: float}}, chains {method: [name, ...]}, each answer made from the one
        before it, feedback {name: the critique that the answer follows}, and verdicts {judge: {"pit_vs_original": 1,
        0, -1 or None}}. Without a verdict the scores decide who is ahead.
      figures: name -> SVG, as `figures.draw` returns them; may be empty.

    Returns:
      HTML, below 5 MB: of many or long samples some are left out, which the page says.
    """
    results = tables.in_order(results)
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    data, limits = _samples(samples)
    drawn = _figures(results, figures)
    run = _run(results, config)
    sections = [("figures", "Figures", drawn), ("tables", "Tables", True), ("samples", "Samples", data["rows"])]
    sections += [("run", "Run", run)]
    parts = {
        "policy": policy(template),
        "title": html.escape(tables.title(results) or "Results"),
        "subtitle": html.escape(_subtitle(results)),
        "nav": "".join(f'<a href="#{name}">{text}</a>' for name, text, there in sections if there),
        "headlines": "".join(map(_card, headlines(results))),
        "figures": drawn,
        "tables": "".join(map(_table, tables.tables(results))) or "<p>There are none yet.</p>",
        "no_samples": "" if data["rows"] else " hidden",
        "limits": html.escape(limits),
        "run": run,
        "data": script_json(data),
    }
    return fill(template, parts)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Puts parts where the template has their {{name}}. What a part holds is not read again."""
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no UTF-8


def policy(template: str) -> str:
    """A Content-Security-Policy under which the template's own scripts run and nothing is fetched or sent."""
    scripts = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(data) -> str:
    """JSON for inside a script element: ASCII, without the characters that HTML reads."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def changes(before: str, after: str) -> list[str]:
    """Word differences of two texts.

    Returns:
      Pieces that begin with "=" (in both), "-" (only before) or "+" (only after). Those with "=" and "+" make up
      `after`, letter by letter; words that differ in the white space behind them count as equal.
    """
    old, new = _WORD.findall(before), _WORD.findall(after)
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    pieces = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            pieces.append("=" + "".join(new[j1:j2]))
            continue
        pieces += ["-" + "".join(old[i1:i2])] if i1 < i2 else []
        pieces += ["+" + "".join(new[j1:j2])] if j1 < j2 else []
    return pieces


class Headline(NamedTuple):
    """A number that says much. tone is "up" or "down" where a 95% interval leaves 0 out, else ""."""

    value: str
    label: str
    details: tuple[str, ...]
    tone: str = ""


def headlines(results: Mapping) -> list[Headline]:
    """The first judge's deltas with those of the other judges, and what the answers and R_PIT are like."""
    found = []
    for name in ("pit_vs_original", "pit_vs_self_refine", "srt_stage1_vs_base", "srt_stage2_vs_stage1"):
        judges = {j: s for j, s in results.get("comparisons", {}).get(name, {}).items() if s.get("delta") is not None}
        for judge, s in list(judges.items())[:1]:
            value = f"{tables.percent(s['delta'], signed=True, digits=1)} points"
            tone = "up" if s["low"] > 0 else "down" if s["high"] < 0 else ""
            won = f"wins {_short(s['win'])}, loses {_short(s['lose'])}"
            sure = f"95% interval {tables.interval(s, signed=True, digits=1)}, {s['n']:,} prompts"
            others = [_said(other, judges[other]) for other in judges if other != judge]
            found.append(Headline(value, f"{proper(name)}, by the {judge}", (won, sure, *others), tone))
    answers = results.get("answers", {})
    base, refined = answers.get("base", {}), answers.get("srt_stage1", {})
    if base.get("all_met") is not None and refined.get("all_met") is not None:
        values = [base["all_met"], refined["all_met"], answers.get("srt_stage2", {}).get("all_met")]
        value = " → ".join(_short(x) for x in values if x is not None)
        names = " → ".join(["M_base", "stage 1", "stage 2"][: value.count("→") + 1])
        mended = answers.get("refined_base", {}).get("fixed")
        details = () if mended is None else (f"of M_base's failing answers stage 1 mends {_short(mended)}",)
        found.append(Headline(value, f"meet every requirement, {names}", details))
    if results.get("srt", {}).get("parse_rate") is not None:
        found.append(
            Headline(_short(results["srt"]["parse_rate"]), "of critiques on the test prompts end in a refinement", ())
        )
    original, improved = answers.get("original", {}), answers.get("pit", {})
    if original.get("all_met") is not None and improved.get("all_met") is not None:
        value = f"{_short(original['all_met'])} → {_short(improved['all_met'])}"
        fixed, kept = _short(improved.get("fixed")), _short(improved.get("kept"))
        details = (f"of failing answers {fixed} fixed", f"of good answers {kept} kept")
        found.append(Headline(value, "meet every requirement, original → PIT", details))
    if improved.get("copy_rate") is not None:
        lengths = [f"{a['tokens']:.1f}" for a in (original, improved) if a.get("tokens") is not None]
        details = (f"mean length {' → '.join(lengths)} tokens",) if len(lengths) == 2 else ()
        found.append(Headline(_short(improved["copy_rate"]), "of PIT's answers copy the original", details))
    r_pit = results.get("reward_models", {}).get("r_pit", {})
    if r_pit.get("accuracy") is not None:
        details = (f"95% interval {tables.interval(r_pit, digits=1)}, {r_pit['n']:,} test pairs",)
        found.append(Headline(_short(r_pit["accuracy"]), "of labelled pairs are ordered rightly by R_PIT", details))
    return found


def _said(judge: str, s: Mapping) -> str:
    delta, bounds = tables.percent(s["delta"], signed=True, digits=1), tables.interval(s, signed=True, digits=1)
    return f"{judge} {delta} {bounds}, {s['n']:,} prompts"


def _short(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _subtitle(results: Mapping) -> str:
    parts = []
    ns = {s["n"] for judges in results.get("comparisons", {}).values() for s in judges.values() if s.get("n")}
    if ns:
        parts.append(f"{max(ns):,} test prompts")
    if results.get("temperature") is not None:
        parts.append(f"sampled at temperature {results['temperature']:g}")
    seconds = sum(stage.get("seconds") or 0.0 for stage in results.get("stages", {}).values())
    if seconds:
        parts.append(
            f"stages took {seconds / 60:.0f} minutes" if seconds >= 90 else f"stages took {seconds:.0f} seconds"
        )
    return ", ".join(parts)


def _card(headline: Headline) -> str:
    details = "".join(f"<small>{html.escape(detail)}</small>" for detail in headline.details)
    return (
        f'<li><span class="value {headline.tone}">{html.escape(headline.value)}</span>'
        f'<span class="label">{html.escape(headline.label)}</span>{details}</li>'
    )


def _figures(results: Mapping, figures: Mapping[str, str]) -> str:
    captions = figures_lib.captions(results)
    colors = {figures_lib.INK: "ink", figures_lib.QUIET: "quiet", figures_lib.GRID: "grid", figures_lib.PAPER: "paper"}
    colors |= {color: f"s{i}" for i, color in enumerate(figures_lib.SERIES)}
    shown = []
    for name, svg in figures.items():
        title, caption = captions.get(name, (proper(name), ""))
        svg = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: f"var(--{colors[m[0]]})" if m[0] in colors else m[0], svg)
        shown.append(
            f"<figure><figcaption><h3>{html.escape(title)}</h3><span>{html.escape(caption)}</span></figcaption>"
            f"{svg}</figure>"
        )
    body = f'<section id="figures"><h2>Figures</h2><div class="figures">{"".join(shown)}</div></section>'
    return body if shown else ""


def _table(table: tables.Table) -> str:
    notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in table.notes)
    if not table.rows:
        return f"<div>{notes}</div>"
    left = lambda i: ' class="left"' if i < table.num_left else ""  # noqa: E731
    head = "".join(f'<th scope="col"{left(i)}>{html.escape(name)}</th>' for i, name in enumerate(table.header))
    body = []
    for r, row in enumerate(table.rows):
        new = r == 0 or row[0] != table.rows[r - 1][0] or table.num_left == 1
        cells = []
        if new:
            same = 1
            while table.num_left > 1 and r + same < len(table.rows) and table.rows[r + same][0] == row[0]:
                same += 1
            span = f' rowspan="{same}" scope="rowgroup"' if same > 1 else ' scope="row"'
            cells.append(f'<th class="left"{span}>{html.escape(row[0])}</th>')
        tones = _tones(table.header, row)
        for i, cell in enumerate(row[1:], start=1):
            classes = " ".join(filter(None, ["left" if i < table.num_left else "", tones.get(i, "")]))
            attribute = f' class="{classes}"' if classes else ""
            cells.append(f"<td{attribute}>{html.escape(cell)}</td>")
        group = ' class="group"' if new and table.num_left > 1 else ""
        body.append(f"<tr{group}>{''.join(cells)}</tr>")
    title = html.escape(table.title)
    box = (
        f'<div class="box" role="region" aria-label="{title}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
    )
    opened = " open" if table.name in _OPEN else ""
    return f'<details id="table-{html.escape(table.name)}"{opened}><summary><h3>{title}</h3></summary>{box}</details>'


def _tones(header: list[str], row: list[str]) -> dict[int, str]:
    """Cells of a delta whose interval does not hold 0."""
    if "delta" not in header or "95% interval" not in header:
        return {}
    bounds = re.fullmatch(r"\[([+-])[\d.]+, ([+-])[\d.]+\]", row[header.index("95% interval")])
    if not bounds or bounds[1] != bounds[2]:
        return {}
    return {header.index("delta"): "up" if bounds[1] == "+" else "down"}


def _run(results: Mapping, config: Mapping) -> str:
    commands = dict(results.get("commands", {}))
    for name, command in results.get("missing", {}).items():
        commands.setdefault(f"Trains what is missing: {tables.words(name)}", command)
    shown = "".join(
        f'<h3>{html.escape(what)}</h3><pre class="command">{html.escape(command)}</pre>'
        for what, command in commands.items()
    )
    if config:
        lines = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in _leaves(config))
        shown += f'<details><summary><h3>Config</h3></summary><pre tabindex="0">{html.escape(lines)}</pre></details>'
    return f'<section id="run"><h2>Run</h2>{shown}</section>' if shown else ""


def _leaves(tree: Mapping, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _samples(samples: Sequence[Mapping]) -> tuple[dict, str]:
    """What the page's script reads, and what it lacks, in words."""
    names = sorted({name: None for s in samples for name in s["answers"]}, key=tables.place)
    judges = sorted({judge: None for s in samples for key in ("scores", "verdicts") for judge in s.get(key) or {}},
                    key=tables.place)  # fmt: skip
    chains = _chains(samples, names)
    frame = {
        "original": next((name for name in ("original", "base") if name in names), "original"),
        "names": names,
        "labels": [proper(name) for name in names],
        "judges": judges,
        "chains": chains,
    }
    rows: dict[int, dict] = {}
    sizes: dict[int, int] = {}
    num_shown = len(samples)
    while True:
        kept = [i * len(samples) // num_shown for i in range(num_shown)] if num_shown else []
        total = 0
        for i in kept:
            if i not in rows:
                rows[i] = _row(i, samples[i], names, judges, chains)
                sizes[i] = len(script_json(rows[i]))
            total += sizes[i]
            if total > MAX_SAMPLES_BYTES:
                break
        else:
            break
        # Rows differ in size: what was read so far says how many will fit.
        read = kept.index(i) + 1
        num_shown = min(num_shown - 1, max(int(0.95 * read), 0))
    limits = []
    if num_shown < len(samples):
        limits.append(f"{num_shown:,} of {len(samples):,} prompts, evenly spaced, so that this page stays small.")
    if any(_is_long(text) for i in kept for text in [samples[i]["prompt"], *samples[i]["answers"].values()]):
        limits.append(f"Texts are cut after {MAX_CHARACTERS:,} characters.")
    if limits:
        limits.append("All is in samples/test.jsonl.")
    return frame | {"rows": [rows[i] for i in kept]}, " ".join(limits)


def _chains(samples: Sequence[Mapping], names: list[str]) -> dict[str, list[str]]:
    """method -> names, each answer made from the one before; guessed from the names where the samples do not say."""
    found: dict[str, list[str]] = {}
    for sample in samples:
        for method, chain in (sample.get("chains") or {}).items():
            if len(chain) > len(found.get(method, [])):
                found[method] = list(chain)
    if found or "original" not in names:
        return tables.in_order(found)
    for method in ("pit", "self_refine", "rerank"):
        chain = [name for name in names if re.fullmatch(rf"{method}(_iteration_\d+)?", name)]
        if chain:
            found[method] = ["original", *chain]
    return found


def _row(i: int, sample: Mapping, names: list[str], judges: list[str], chains: Mapping[str, list[str]]) -> dict:
    answers = {name: _cut(text) for name, text in sample["answers"].items()}
    differences = {
        after: changes(answers[before], answers[after])
        for chain in chains.values()
        for before, after in zip(chain, chain[1:], strict=False)
        if before in answers and after in answers
    }
    met, scores, feedback = (sample.get(key) or {} for key in ("met", "scores", "feedback"))
    return {
        "i": i,
        "p": _cut(sample["prompt"]),
        "r": [_requirement(*requirement) for requirement in sample.get("requirements") or []],
        "a": [None if name in differences else answers.get(name) for name in names],
        "d": differences,
        "m": ["".join("01"[bool(x)] for x in met[name]) if name in met else None for name in names],
        "s": [[_score(scores.get(judge, {}).get(name)) for name in names] for judge in judges],
        "v": sample.get("verdicts") or {},
    } | ({"f": [_cut(feedback[name]) if name in feedback else None for name in names]} if feedback else {})


def _requirement(kind: str, value: str) -> str:
    words = str(kind).replace("_", " ")
    return f"{words}: {value}" if value else words


def _score(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def _is_long(text: str) -> bool:
    return len(text) > MAX_CHARACTERS


def _cut(text: str) -> str:
    return f"{text[:MAX_CHARACTERS]} [cut here]" if _is_long(text) else text
