"""Topics: building and parsing are inverse, and nothing that is not ours is taken for ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire import topics as t
from midge.wire.errors import TopicError
from midge.wire.identifiers import PATTERN
from midge.wire.topics import Topics
from tests.wire.examples import NOT_IDENTIFIERS

DEMO = Topics("demo")

BUILT = {
    "midge/1/demo/coordinator": (DEMO.coordinator, t.CoordinatorTopic()),
    "midge/1/demo/rollcall": (DEMO.rollcall, t.RollCallTopic()),
    "midge/1/demo/model/tiny/head": (DEMO.head("tiny"), t.HeadTopic("tiny")),
    "midge/1/demo/model/tiny/1/0": (DEMO.model_frame("tiny", 1, 0), t.ModelFrameTopic("tiny", 1, 0)),
    "midge/1/demo/agent/pi-3/presence": (DEMO.presence("pi-3"), t.PresenceTopic("pi-3")),
    "midge/1/demo/agent/pi-3/inbox": (DEMO.inbox("pi-3"), t.InboxTopic("pi-3")),
    "midge/1/demo/agent/pi-3/outbox": (DEMO.outbox("pi-3"), t.OutboxTopic("pi-3")),
    "midge/1/demo/agent/pi-3/update/0/17": (DEMO.update_frame("pi-3", 0, 17), t.UpdateFrameTopic("pi-3", 0, 17)),
}

NOT_OURS = {
    "nothing": "",
    "the prefix alone": "midge/1/demo",
    "an empty level at the end": "midge/1/demo/",
    "another root": "midgee/1/demo/coordinator",
    "another version of the protocol": "midge/2/demo/coordinator",
    "another federation": "midge/1/other/coordinator",
    "a federation whose name begins like ours": "midge/1/demo2/coordinator",
    "a slash before": "/midge/1/demo/coordinator",
    "a capital": "midge/1/demo/Coordinator",
    "an unknown word": "midge/1/demo/overseer",
    "a level too many": "midge/1/demo/coordinator/x",
    "an empty level": "midge/1/demo/agent//outbox",
    "an agent and no more": "midge/1/demo/agent/pi-3",
    "an unknown word of an agent": "midge/1/demo/agent/pi-3/mailbox",
    "a slash at the end": "midge/1/demo/agent/pi-3/outbox/",
    "an update without a frame": "midge/1/demo/agent/pi-3/update/0",
    "an update with a level too many": "midge/1/demo/agent/pi-3/update/0/1/2",
    "a leading zero in a shard": "midge/1/demo/agent/pi-3/update/00/1",
    "a leading zero in a frame": "midge/1/demo/agent/pi-3/update/0/01",
    "a negative frame": "midge/1/demo/agent/pi-3/update/0/-1",
    "a frame with a sign": "midge/1/demo/agent/pi-3/update/0/+1",
    "a frame with a space": "midge/1/demo/agent/pi-3/update/0/ 1",
    "a frame with an underscore": "midge/1/demo/agent/pi-3/update/0/1_0",
    "a frame of ten digits": "midge/1/demo/agent/pi-3/update/0/1000000000",
    "an Arabic digit": "midge/1/demo/agent/pi-3/update/0/\u0661",
    "a superscript digit": "midge/1/demo/agent/pi-3/update/0/\u00b2",
    "a frame with a line feed": "midge/1/demo/agent/pi-3/update/0/1\n",
    "a third slot": "midge/1/demo/model/tiny/2/0",
    "a leading zero in a slot": "midge/1/demo/model/tiny/00/0",
    "a model without a word": "midge/1/demo/model/tiny",
    "a topic of the broker": "$SYS/broker/uptime",
    "our own wildcard": "midge/1/demo/agent/+/outbox",
    "a line feed at the end": "midge/1/demo/coordinator\n",
}


@pytest.mark.parametrize("topic", BUILT)
def test_a_topic_is_built_and_parsed_as_the_page_says(topic):
    built, typed = BUILT[topic]
    assert built == topic
    assert DEMO.parse(topic) == typed


@pytest.mark.parametrize("topic", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_what_is_not_ours_is_refused(topic):
    with pytest.raises(TopicError) as caught:
        DEMO.parse(topic)
    assert str(caught.value) == f"topic {topic!r}: not one of federation 'demo' (expected midge/1/demo/...)"


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", NOT_IDENTIFIERS.values(), ids=NOT_IDENTIFIERS.keys())
def test_what_is_no_identifier_gets_into_no_topic(name):
    with pytest.raises(TopicError, match="federation"):
        Topics(name)
    for build in (DEMO.head, DEMO.presence, DEMO.inbox, DEMO.outbox):
        with pytest.raises(TopicError, match="expected 1 to 64 characters"):
            build(name)
    with pytest.raises(TopicError, match="expected 1 to 64 characters"):
        DEMO.model_frame(name, 0, 0)
    with pytest.raises(TopicError, match="expected 1 to 64 characters"):
        DEMO.update_frame(name, 0, 0)


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", NOT_IDENTIFIERS.values(), ids=NOT_IDENTIFIERS.keys())
def test_what_is_no_identifier_is_parsed_out_of_no_topic(name):
    for topic in (f"agent/{name}/outbox", f"agent/{name}/update/0/0", f"model/{name}/head", f"model/{name}/0/0"):
        with pytest.raises(TopicError, match="not one of federation"):
            DEMO.parse(f"midge/1/demo/{topic}")


names = st.from_regex(PATTERN)
numbers = st.integers(0, 10**9 - 1)


@given(names, names, st.integers(0, 1), numbers, numbers)
def test_parsing_undoes_building_and_no_topic_has_more_than_seven_slashes(federation, name, slot, shard, index):
    topics = Topics(federation)
    pairs = [
        (topics.head(name), t.HeadTopic(name)),
        (topics.model_frame(name, slot, index), t.ModelFrameTopic(name, slot, index)),
        (topics.presence(name), t.PresenceTopic(name)),
        (topics.inbox(name), t.InboxTopic(name)),
        (topics.outbox(name), t.OutboxTopic(name)),
        (topics.update_frame(name, shard, index), t.UpdateFrameTopic(name, shard, index)),
    ]
    for topic, typed in pairs:
        assert topics.parse(topic) == typed
        assert topic.count("/") <= 7
        assert len(topic.encode()) <= 256


@given(st.text(max_size=60))
def test_whatever_follows_the_prefix_parses_back_to_itself_or_is_refused(rest):
    topic = f"midge/1/demo/{rest}"
    try:
        typed = DEMO.parse(topic)
    except TopicError:
        return
    assert BUILD[type(typed)](DEMO, typed) == topic


BUILD = {
    t.CoordinatorTopic: lambda topics, _: topics.coordinator,
    t.RollCallTopic: lambda topics, _: topics.rollcall,
    t.HeadTopic: lambda topics, typed: topics.head(typed.run_id),
    t.ModelFrameTopic: lambda topics, typed: topics.model_frame(typed.run_id, typed.slot, typed.index),
    t.PresenceTopic: lambda topics, typed: topics.presence(typed.agent_id),
    t.InboxTopic: lambda topics, typed: topics.inbox(typed.agent_id),
    t.OutboxTopic: lambda topics, typed: topics.outbox(typed.agent_id),
    t.UpdateFrameTopic: lambda topics, typed: topics.update_frame(typed.agent_id, typed.shard, typed.index),
}


def test_the_subscriptions_of_a_coordinator_are_wildcards_over_what_agents_write():
    assert DEMO.all_presences == "midge/1/demo/agent/+/presence"
    assert DEMO.all_outboxes == "midge/1/demo/agent/+/outbox"
    assert DEMO.all_update_frames == "midge/1/demo/agent/+/update/+/+"


def test_a_topic_too_long_to_be_ours_is_refused_without_showing_all_of_it():
    with pytest.raises(TopicError) as caught:
        DEMO.parse("midge/1/demo/" + "a" * 60_000)
    shown = "midge/1/demo/" + "a" * 104 + "..."
    assert str(caught.value) == f"topic {shown!r}: not one of federation 'demo' (expected midge/1/demo/...)"


def test_the_topics_of_a_federation_say_whose_they_are():
    assert repr(DEMO) == "Topics('demo')"
