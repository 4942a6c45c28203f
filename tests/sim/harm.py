"""What befalls a world of bare machines: connections that break, a broker that forgets, processes that are killed."""

from __future__ import annotations

from tests.sim.world import World

HARM_ENDS_S = 200.0


def plan(world: World) -> None:
    """Have it happen, often or now and then, until `HARM_ENDS_S`."""
    rng = world.rng
    at = rng.uniform(1.0, 30.0)
    often_s = rng.choice((10.0, 40.0, 1000.0))
    while at < HARM_ENDS_S:
        world.network.after(at, _do_harm, world)
        at += rng.uniform(1.0, often_s)


def _do_harm(world: World) -> None:
    rng = world.rng
    node, seconds = rng.choice(list(world.nodes.values())), rng.uniform(0.1, 20.0)
    kind = rng.choice(("restart the broker", "cut the agent", "cut the agent", "kill the agent", "cut", "kill"))
    world.tell(f"{kind} {node.agent_id} {seconds:.1f}")
    match kind:
        case "restart the broker":  # it has forgotten everything
            world.forget_all()
            for each in world.nodes.values():
                each.cut(rng.uniform(0.1, seconds))
            world.cut(seconds)
        case "cut the agent":
            node.cut(seconds)
        case "kill the agent":
            node.crash(seconds)
        case "cut":
            world.cut(seconds)
        case "kill":
            world.crash(seconds)
