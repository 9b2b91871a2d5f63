"""Conversations about pictures and videos, in the formats that people have: one strict reader."""

from mm_data.conversations.conversation import REASONS, Box, Conversation, Media, Turn, Unusable
from mm_data.conversations.formats import Tags
from mm_data.conversations.ledger import Ledger
from mm_data.conversations.mindspeed import DataJson, is_data_json, read_data_json
from mm_data.conversations.reader import Conversations, Source, read_conversations
from mm_data.conversations.survey import Survey, find_missing

__all__ = [
    "REASONS",
    "Box",
    "Conversation",
    "Conversations",
    "DataJson",
    "Ledger",
    "Media",
    "Source",
    "Survey",
    "Tags",
    "Turn",
    "Unusable",
    "find_missing",
    "is_data_json",
    "read_conversations",
    "read_data_json",
]
