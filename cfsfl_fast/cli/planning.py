"""`cfsfl plan`: what training will take, before anything is allocated."""

from __future__ import annotations

from typing import Any

import click

from cfsfl_fast.cli.options import config_field, config_options, device_option, torch_device
from cfsfl_fast.config import PRESETS, CFSFLConfig
from cfsfl_fast.plan import Scaled, measured_rates, plan, size_text
from cfsfl_fast.plan import scaling as scaled
from cfsfl_fast.scarcity import free_memory


@click.command("plan")
@click.option("--items", type=int, required=True, help="M.")
@click.option("--users", type=int, required=True, help="Training users.")
@click.option("--events-per-user", default=100.0, help="Items of a user, on average.")
@click.option("--devices", default=1, help="Processes, each with a device of its own.")
@click.option("--item-shards", default=1, help="Devices that share the rows of every item table.")
@click.option("--memory", type=float, help="GB free on a device; measured here by default.")
@click.option("--gflops", type=float, help="Rate of a device's products; measured here by default.")
@click.option("--bandwidth", type=float, help="GB/s of a device's memory; measured here by default.")
@click.option("--link", type=float, help="GB/s between devices.")
@click.option("--scaling", is_flag=True, help="Also print what 1 to 64 devices come to; needs --link.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="default", help="Where the defaults come from.")
@device_option
@config_options
def plan_command(
    items: int,
    users: int,
    events_per_user: float,
    devices: int,
    item_shards: int,
    memory: float | None,
    gflops: float | None,
    bandwidth: float | None,
    link: float | None,
    scaling: bool,
    preset: str,
    device: str,
    **options: Any,
) -> None:
    """Memory by part, messages and time of an update, before anything is allocated.

    The options below --preset are the fields of the config. Ends with exit code 2 where training cannot fit.
    """
    fields = {name: config_field(name, text) for name, text in options.items() if text is not None}
    config = CFSFLConfig.from_dict({**PRESETS[preset], **fields})
    if scaling and link is None:
        raise ValueError("--scaling needs --link, GB/s between devices; got none")
    where = torch_device(device)
    planned = plan(
        items,
        users,
        config,
        events_per_user=events_per_user,
        devices=devices,
        item_shards=item_shards,
        mapped=where.type == "cpu",
    )
    click.echo(planned)
    if gflops is None or bandwidth is None:
        rate, copied = measured_rates(where)
        gflops, bandwidth = gflops or rate / 1e9, bandwidth or copied / 1e9
    if min(gflops, bandwidth, *([] if link is None else [link])) <= 0:
        raise ValueError(f"rates must be above 0; got {gflops} GFLOP/s, {bandwidth} GB/s, a link of {link} GB/s")
    seconds = planned.seconds(gflops * 1e9, bandwidth * 1e9, None if link is None else link * 1e9)
    parts = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    click.echo(f"\nat {gflops:,.0f} GFLOP/s, {bandwidth:,.0f} GB/s: {sum(seconds.values()):.3g} s ({parts})")
    if link is None and devices > 1:
        click.echo("without the messages: --link says how fast they travel")
    if scaling and link is not None:
        rates = gflops * 1e9, bandwidth * 1e9, link * 1e9
        click.echo(f"\n{_table(scaled(items, users, config, *rates, events_per_user=events_per_user))}")
    planned.check(free_memory(where) if memory is None else memory * 1e9)


def _table(rows: list[Scaled]) -> str:
    """Efficiencies by the number of devices, as a person reads them."""
    lines = ["devices  item shards  memory of each  sent an update  efficiency: one batch  a batch that grows"]
    for row in rows:
        sent, memory = size_text(sum(row.shared.messages.values())), size_text(row.shared.total)
        sizes = f"{row.devices:>7}{row.item_shards:>13}{memory:>16}{sent:>16}"
        lines.append(f"{sizes}{row.same_batch:>23.1%}{row.grown_batch:>20.1%}")
    return "\n".join(lines)
