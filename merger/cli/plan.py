"""`merger plan`: what a recipe would do."""

import json
from pathlib import Path
from typing import Any

import click

from merger.budget import Allotment
from merger.checkpoint import root_of
from merger.cli.run import with_output
from merger.cli.terminal import Size, gigabytes, running_options
from merger.licenses import Verdict
from merger.methods.method import is_open
from merger.plan import Plan, fetch_size
from merger.preflight import check_disk, free_space
from merger.publish import check_free, finished_shards
from merger.push import check_license, destination_of, judged
from merger.recipe import Document, read_document
from merger.run import Options, output_of, plan_of
from merger.sources import LocalSources


@click.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field, as in --set k=8.")
@click.option("--bandwidth", type=Size(), help="Bytes a second from the Hub, such as 125MB: tells how long it takes.")
@running_options
def command(
    recipe: Path,
    changes: tuple[str, ...],
    output: str | None,
    bandwidth: int | None,
    accept_license: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what RECIPE would read, compute and write, or why it would be refused. No weight is read."""
    document = read_document(recipe, with_output(changes, output, accept_license=accept_license))
    plan, allotment = plan_of(document, Options(**options))
    finished = _check_output(document, plan)
    destination = destination_of(document.output, LocalSources().hub)
    if destination and not is_open(document.recipe):
        check_license(document, plan, destination)
        destination.check(plan)
    data = {
        **_as_data(plan, allotment, finished, document),
        **_afar(plan, bandwidth),
        "push": destination.name if destination else None,
        "license": _license_data(judged(plan, destination), document),
    }
    click.echo(json.dumps(data, indent=2) if as_json else _as_text(data))


def _check_output(document: Document, plan: Plan) -> int:
    """The checks of the output folder, where the recipe names one; how many bytes of it are finished.

    Of a recipe that has choices to make the plan is not known before they are made.
    """
    if document.output.path is None or is_open(document.recipe):
        return 0
    output = output_of(document)
    check_free(output, plan)
    finished = sum(receipt.size for receipt in finished_shards(output, plan))
    check_disk(plan, output, finished)
    return finished


def _afar(plan: Plan, bandwidth: int | None) -> dict[str, Any]:
    """What comes from elsewhere, and how long that takes."""
    fetched = fetch_size(plan)
    return {"fetch_bytes": fetched, "fetch_seconds": fetched / bandwidth if bandwidth else None}


def _as_data(plan: Plan, allotment: Allotment, finished: int, document: Document) -> dict[str, Any]:
    return {
        "method": document.recipe.method,
        "output": document.output.path,
        "fingerprint": plan.fingerprint,
        "parameters": plan.parameters,
        "tensors": len(plan.checkpoint.tensors),
        "read_bytes": plan.read_size,
        "write_bytes": plan.size,
        "finished_bytes": finished,
        "free_bytes": free_space(Path(document.output.path or ".").expanduser()),
        "memory": {"bytes": allotment.memory, "threads": allotment.threads},
        "wholes": _wholes(plan, allotment),
        "shards": [{"file": shard.name, "bytes": shard.size, "tensors": len(shard.entries)} for shard in plan.shards],
        "sources": [
            {
                "reference": part.source.reference,
                "step": part.source.step,
                "weight": part.weight,
                "commit": part.source.revision or None,
                "gated": part.source.gated,
                "license": part.source.card.license,
            }
            for part in plan.checkpoint.parts
        ],
        "side_files": sorted(plan.checkpoint.side_files),
        "claim": origin.says if (origin := root_of(plan.checkpoint)) else None,
        "warnings": list(plan.checkpoint.warnings),
        "notes": list(plan.checkpoint.notes),
    }


def _wholes(plan: Plan, allotment: Allotment) -> dict[str, Any] | None:
    """The tensors that are made as a whole: how many, what the dearest takes, and what lies beside the result."""
    if not plan.wholes:
        return None
    dearest = plan.wholes[0]
    return {
        "count": len(plan.wholes),
        "largest": dearest.name,
        "bytes": dearest.cost,
        "scratch_bytes": plan.scratch_size(),
        "device": allotment.device,
    }


def _wholes_line(found: dict[str, Any]) -> str:
    device = "" if found["device"] == "auto" else f" on {found['device']}"
    return (
        f"whole       tensors made as a whole{device}: {found['count']:,}, at most {gigabytes(found['bytes'])} "
        f"({found['largest']}), {gigabytes(found['scratch_bytes'])} beside the result for a while"
    )


def _as_text(data: dict[str, Any]) -> str:
    lines = [
        f"method      {data['method']}",
        f"output      {data['output'] or data['push'] or '(none yet: name one with -o)'}",
        *([f"push        {data['push']}, which has room for it"] if data["push"] else []),
        f"parameters  {data['parameters']:,} in {data['tensors']:,} tensors",
        f"read        {gigabytes(data['read_bytes'])}{_afar_text(data)}",
        f"write       {gigabytes(data['write_bytes'])}, files: {len(data['shards'])}"
        + (f", {gigabytes(data['finished_bytes'])} are finished" if data["finished_bytes"] else ""),
        f"disk        {gigabytes(data['free_bytes'])} free",
        f"memory      {gigabytes(data['memory']['bytes'])} of buffers in {data['memory']['threads']} threads",
        *([_wholes_line(data["wholes"])] if data["wholes"] else []),
        f"plan        {data['fingerprint'][:16]}",
        "sources",
        *(_source_line(source) for source in data["sources"]),
    ]
    lines += [f"result      {data['claim']}"] if data["claim"] else []
    lines += _license_lines(data["license"])
    lines += [f"warning     {warning}" for warning in data["warnings"]]
    lines += [f"note        {note}" for note in data["notes"]]
    return "\n".join(lines)


def _afar_text(data: dict[str, Any]) -> str:
    if not data["fetch_bytes"]:
        return ""
    seconds = f", {data['fetch_seconds']:,.0f} s at that bandwidth" if data["fetch_seconds"] else ""
    return f", {gigabytes(data['fetch_bytes'])} of it from elsewhere{seconds}"


def _license_data(judged: Verdict, document: Document) -> dict[str, Any]:
    return {
        "verdict": judged.kind,
        "accepted": document.output.accept_license,
        "fields": dict(judged.license),
        "reasons": list(judged.reasons),
        "obligations": list(judged.obligations),
    }


def _license_lines(license: dict[str, Any]) -> list[str]:
    """The licence that the result would carry where it is passed on, and why."""
    name = license["fields"].get("license_name") or license["fields"].get("license", "not known")
    asked = "accepted" if license["accepted"] else "to be accepted with --accept-license where it is passed on"
    says = {"carried": name, "ask": f"{name}, {asked}", "refuse": "not to be passed on"}[license["verdict"]]
    return [f"license     {says}", *(f"            {reason}" for reason in license["reasons"])]


def _source_line(source: dict[str, Any]) -> str:
    step = f"  step {source['step']}" if source["step"] is not None else ""
    commit = f"  commit {source['commit'][:12]}" if source["commit"] else ""
    gated = "  gated" if source["gated"] else ""
    return f"  {source['weight']:12.6g}  {source['reference']}{step}{commit}{gated}"
