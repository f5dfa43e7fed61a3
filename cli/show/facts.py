"""Cells and records that describe a stored version, from its manifest; several commands share them."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...domains.names import is_name
from ...registry.measure.measurable import MIN_GAIN, NOT_MEASURABLE
from .charts import layers, sparkline
from .numbers import bits, brief, duration, exact, percent, plural, short
from .page import Block, Cell, Line, Paragraph, Part, Span, Table, cell, faint, line, table

if TYPE_CHECKING:
    from ...domains.statistics.prototypes import Neighbour
    from ...registry.learn.acceptance import AcceptanceCheck
    from ...registry.learn.chat_probe import ChatProbe
    from ...registry.measure.kinds import KindPortrait
    from ...registry.store.manifest import PackManifest

SHOWN_QUESTIONS = 8
SCORES = (
    "BITS/BYTE",
    "BASE",
    "OWN EXPERTS",
    "ROUTED",
    "95 %",
    "ORACLE GAIN",
)  # the last: the share of the oracle's gain


def reference(manifest: "PackManifest") -> str:
    """Return `name@version`."""
    return f"{manifest.name}@{manifest.version}"


def parameters(manifest: "PackManifest") -> int:
    """Count the parameters of all experts."""
    return sum(expert.parameters for expert in manifest.experts)


def expert_count(manifest: "PackManifest") -> int:
    """Count the experts of all layers."""
    return sum(manifest.allocation["counts"])


def record(manifest: "PackManifest") -> dict[str, Any]:
    """Return what every command that stores a version gives for --json."""
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "parameters": parameters(manifest),
        "experts_per_layer": list(manifest.allocation["counts"]),
    }


def per_layer(counts: Iterable[int]) -> Cell:
    """Show one count per decoder layer, as small columns and as digits."""
    numbers = list(counts)
    digits = " ".join(map(str, numbers))
    shown = line(Span(layers(numbers), "slot1"), *([f"   {digits}"] if len(numbers) <= 40 else []))
    return cell(shown, digits)


def experts(manifest: "PackManifest") -> Cell:
    """Describe the experts: how many, in how many layers, with which rank, alpha and method."""
    counts, first = manifest.allocation["counts"], manifest.experts[0]
    bearing = sum(1 for count in counts if count)
    text = (
        f"{plural(sum(counts), 'expert')} in {bearing} of {plural(len(counts), 'layer')}, "
        f"rank {first.rank}, alpha {first.alpha:g}, {first.method}, {short(parameters(manifest))} parameters"
    )
    return cell(text)


def scores(manifest: "PackManifest") -> Table:
    """Make the table of bits per byte on the domain's held-out text and on general text."""
    found = manifest.evaluation
    own = score_row(manifest.name, found)
    rows = [own]
    if found.get("general_routed") is not None:
        general = {"base": found.get("general_base"), "routed": found["general_routed"]}
        rows.append(score_row("general text", general))
    return score_table(rows)


def score_table(rows: Iterable[Iterable[Cell | Part]]) -> Table:
    """Make a table of bits per byte; lower is better."""
    return table(SCORES, rows, right=SCORES[1:], no_wrap=SCORES)


def score_row(name: str, found: dict[str, Any]) -> list[Cell]:
    """Make a row of `score_table` from a manifest's evaluation."""
    return [
        cell(name),
        number(found.get("base")),
        number(found.get("alone")),
        cell(compared_score(found.get("base"), found.get("routed")), exact(found.get("routed"))),
        interval(found.get("interval")),
        oracle_share(found),
    ]


def oracle_share(found: dict[str, Any]) -> Cell:
    """Make the cell of the share of oracle gain of a manifest's evaluation, or say that it is not measurable."""
    share = found.get("share_of_oracle_gain")
    base, alone = found.get("base"), found.get("alone")
    if base is None or alone is None:
        return cell(percent(share), exact(share))
    # older versions have a share of any gain, however small
    if share is None or base - alone < MIN_GAIN * base:
        return cell(Span(NOT_MEASURABLE, "warn"), NOT_MEASURABLE)
    return cell(percent(share), exact(share))


def number(value: float | None) -> Cell:
    """Make the cell of bits per byte."""
    return cell(bits(value), exact(value))


def interval(bounds: Iterable[float] | None) -> Cell:
    """Make the cell of a 95 % interval."""
    values = list(bounds or [])
    return cell("–".join(map(bits, values)) or "-", " ".join(map(exact, values)))


def compared_score(before: float | None, after: float | None) -> Line:
    """Show the score after a change: green if it is lower than before, red if it is higher."""
    if before is None or after is None:
        return line(bits(after))
    is_worse = after > before * 1.005
    return line(Span(bits(after), "bad" if is_worse else "good" if after < before * 0.995 else ""))


def gain(manifest: "PackManifest") -> float | None:
    """Return the relative reduction of the base model's bits per byte under routing."""
    return reduction(manifest.evaluation.get("base"), manifest.evaluation.get("routed"))


def reduction(before: float | None, after: float | None) -> float | None:
    """Return the relative reduction from the first score to the second."""
    return (before - after) / before if before and after is not None else None


def loss(manifest: "PackManifest") -> Cell | None:
    """Show the training loss: first value, sparkline, last value."""
    losses = manifest.train.get("losses") or []
    if not losses:
        return None
    shown = line(f"{losses[0]:.3f} ", Span(sparkline(losses), "slot1"), f" {losses[-1]:.3f}")
    return cell(shown, " ".join(map(str, losses)))


def validation(manifest: "PackManifest") -> Cell | None:
    """Show the validation curve, and which step was kept."""
    found = manifest.train.get("validation")
    if not found:
        return None
    losses = found["losses"]
    best = losses[found["steps"].index(found["best_step"])]
    ended = f", ended at step {found['steps'][-1]}" if found["stopped_early"] else ""
    shown = line(
        f"{losses[0]:.3f} ", Span(sparkline(losses), "slot1"), f" {best:.3f}, kept of step {found['best_step']}{ended}"
    )
    return cell(shown, " ".join(map(str, losses)))


def training(manifest: "PackManifest") -> Cell:
    """Describe the training: steps, tokens, time; or where the adapter was imported from."""
    train = manifest.train
    if "imported" in train:
        return imported(train["imported"])
    settings = train.get("settings", {})
    parts = [plural(train.get("steps", 0), "step"), f"{short(train.get('tokens', 0))} tokens"]
    parts += [duration(train["seconds"])] if "seconds" in train else []
    parts += [f"learning rate {settings['learning_rate']:.3g}, seed {settings['seed']}"] if settings else []
    return cell(", ".join(parts))


def imported(record: dict[str, Any]) -> Cell:
    """Describe where an imported adapter comes from."""
    commit = f" at {record['commit'][:12]}" if record["commit"] else ""
    digests = [digest for _, digest in sorted(record["files"].items())]
    routing = " without text, so never routed" if record.get("routing") == "none" else ""
    text = f"imported from {record['from']}{commit}{routing}: "
    return cell(line(text, faint(", ".join(map(brief, digests)))), text + ", ".join(digests))


def data(manifest: "PackManifest") -> Cell | None:
    """Describe the training data."""
    found = manifest.train.get("data")
    if not found:
        return None
    names = ", ".join(found["files"])
    return cell(f"{names}: {plural(found['rows'], 'row')}, {found['held_out']} held out, {brief(found['digest'])}")


def proof(manifest: "PackManifest") -> Cell | None:
    """Describe what the frozen proof covers."""
    frozen = manifest.proof.get("frozen")
    if not frozen or not manifest.proof.get("unchanged"):
        return None
    packs: dict[str, str] = frozen.get("packs", {})  # of manifests that name them; later ones have the store's root
    roots = {"store": frozen["store"]["before"]} if "store" in frozen else {}
    digests = {"base": frozen["base"], **roots, **packs}
    older = "every stored version" if roots else plural(len(packs), "pack")
    parts = [f"{name} {brief(digest)}" for name, digest in digests.items()]
    counted = f"{plural(frozen['tensors'], 'tensor')} and {older} unchanged"
    plain = [f"{name} {digest}" for name, digest in digests.items()]
    return cell(line(Span(counted, "good"), faint(", " + ", ".join(parts))), ", ".join([counted, *plain]))


def base(manifest: "PackManifest") -> Cell:
    """Describe the base model."""
    found = manifest.base
    name = found.id + (f" at {found.revision[:12]}" if found.revision else "")
    kind = found.architecture.split()[0]
    shown = line(f"{name}, {kind}, {found.dtype}, ", faint(brief(found.weights)))
    return cell(shown, f"{name}, {kind}, {found.dtype}, {found.weights}")


def drift(manifest: "PackManifest") -> Cell | None:
    """Describe how the routing of older domains changed."""
    found = manifest.proof.get("drift")
    if not found or not found["domains"]:
        return None
    from ...registry.store.manifest import DRIFT_EPSILON

    flips, share = found["top1_flips"], found["newcomer_share"]
    compared = f"{plural(found['domains'], 'older domain')} compared: mean KL {found['mean_kl']:z.4f} nats, "
    taken = f"the new domain takes at most {percent(share, digits=1)}"
    taken += f", more than {percent(DRIFT_EPSILON)}" if share > DRIFT_EPSILON else ""
    flipped = Span(f"{flips or 'none'} routed to another domain", "warn" if flips else "good")
    return cell(line(compared, Span(taken, "warn") if share > DRIFT_EPSILON else taken, ", ", flipped))


def chat(manifest: "PackManifest") -> Cell | None:
    """Describe how much of everyday chat the domain takes."""
    found = manifest.proof.get("chat")
    if not found:
        return None
    everyday, template = found["everyday"], found["template"]
    taken = f"{percent(everyday['before'], digits=1)} -> " if everyday["before"] else ""
    text = f"{percent(everyday['after'], digits=1)} of {plural(everyday['texts'], 'everyday question')}"
    text = f"takes {taken}{text}, {everyday['largest']} as their largest slot"
    if template:
        text += f"; the bare chat template is routed to {'it' if template['largest'] else 'other slots'}"
    return cell(line(Span(text, "good" if found["holds"] else "warn")))


def held_out(manifest: "PackManifest") -> Cell | None:
    """Describe what scores are measured on, and what makes them say little."""
    data = manifest.train.get("data") or {}
    if "held_out_documents" not in data:
        return None
    text = f"{plural(data['held_out'], 'row')} of {plural(data['held_out_documents'], 'document')}"
    problems = [f"\nWarning: {problem}." for problem in data.get("problems", ())]
    return cell(line(text, *(Span(problem, "warn") for problem in problems)))


def held_out_record(manifest: "PackManifest") -> dict[str, Any]:
    """Return what scores are measured on, for --json."""
    data = manifest.train["data"]
    return {
        "rows": data["held_out"],
        "documents": data.get("held_out_documents"),
        "problems": list(data.get("problems", ())),
    }


def warnings(problems: "Iterable[str]") -> list[str]:
    """Return a line of plain text for each problem."""
    return [f"Warning: {problem}." for problem in problems]


def probe_warning(probe: "ChatProbe") -> tuple[Block, ...]:
    """Warn of a domain that takes chat or older domains' text: what it takes, which questions, and what helps."""
    if probe.holds:
        return ()
    problems = Paragraph(line(Span("\n".join(f"Warning: {problem}." for problem in probe.problems), "warn")))
    advice = Paragraph(line("\n".join(("What helps:", *(f"- {one}" for one in probe.advice)))))
    rows = [(cell(question), cell(percent(gate), exact(gate))) for question, gate in probe.taken[:SHOWN_QUESTIONS]]
    columns = ("TAKEN QUESTION", "GATE")
    listed = (table(columns, rows, right=("GATE",), no_wrap=("GATE",)),) if rows else ()
    return problems, *listed, advice


def failing_kinds(check: "AcceptanceCheck") -> tuple[Block, ...]:
    """Show the kinds of text that got worse: scores, n-grams that stand out, and some rows."""
    if not check.failing:
        return ()
    columns = ("WORSE KIND", "ROWS", "PARENT", "NEW", "CHANGE")
    rows = [
        [
            cell(Span(kind.kind, "bad")),
            cell(str(kind.rows)),
            number(kind.before),
            number(kind.now),
            cell(Span(percent(kind.change, digits=1), "bad"), exact(kind.change)),
        ]
        for kind in check.failing
    ]
    return table(columns, rows, right=columns[1:], no_wrap=columns[1:]), *portraits(check.portraits)


def portraits(found: "Iterable[KindPortrait]") -> Iterator[Block]:
    """Yield what people recognize each kind by."""
    for one in found:
        lines = [f"{one.kind} stands out by: {', '.join(one.words) or '-'}", *(f"- {row}" for row in one.examples)]
        yield Paragraph(line("\n".join(lines)), in_pipes=False)


def neighbours(found: "Iterable[Neighbour]") -> Cell | None:
    """List the most similar stored domains."""
    nearest = [f"{near.name} {near.similarity:.2f}" for near in list(found)[:5] if is_name(near.name)]
    return cell(", ".join(nearest)) if nearest else None


def neighbour_record(near: "Neighbour") -> dict[str, Any]:
    """Return a similar domain for --json."""
    return {"name": near.name, "similarity": round(near.similarity, 5)}


def day(time: str) -> Cell:
    """Show the date of a time."""
    return cell(time[:10], time)
