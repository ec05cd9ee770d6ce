"""Fields of records: which are known to be harmless, and the refusal of those that nobody reads.

A reader takes a record and its messages as :class:`~nemo_minitron.accounting.Noted`. A field that it does not ask for
may say how the record is to be trained on, so it is refused, unless it is listed here or has no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.accounting import Noted, unread
from nemo_minitron.data.bad_records import UnknownKinds, shown

__all__ = ["ANSWER_FIELDS", "MESSAGE_FIELDS", "RECORD_FIELDS", "Unknown", "UnknownKinds", "blank", "shown"]

_NAMES = "names the record, and says nothing about its text"
_ORIGIN = "says where the text comes from"
_TIME = "says when it was written"
_NOTES = "notes of those who made the data"
_SORTS = "sorts the records"
_AUTHOR = "says who wrote the text"
_COUNTS = "counts what the text itself shows"
_GENERATE = "written by `minitron generate`"

#: Harmless fields of a conversation or pair -> why they change nothing that is trained.
RECORD_FIELDS: dict[str, str] = {
    **dict.fromkeys(
        ("id", "_id", "idx", "index", "uid", "uuid", "key", "hash", "prompt_id", "question_id", "conversation_id",
         "conversation_hash", "conv_id", "chat_id", "dialogue_id", "session_id", "sample_id", "example_id", "row_id"),
        _NAMES,
    ),
    **dict.fromkeys(
        ("source", "sources", "dataset", "dataset_name", "data_source", "origin", "url", "license", "licence",
         "file_name"),
        _ORIGIN,
    ),
    **dict.fromkeys(("timestamp", "created", "created_at", "create_time", "updated_at", "date"), _TIME),
    **dict.fromkeys(("metadata", "meta", "comment", "comments", "version", "used_in_training"), _NOTES),
    **dict.fromkeys(("language", "lang", "category", "topic", "tags", "domain", "subject", "title"), _SORTS),
    **dict.fromkeys(("model", "model_name", "generator", "annotator", "author", "user_id"), _AUTHOR),
    **dict.fromkeys(("n_turns", "num_turns", "num_tokens", "token_count"), _COUNTS),
    **dict.fromkeys(("prompt_index", "sample", "finish", "tokens", "logprob"), _GENERATE),
    "predicted": "written by `minitron label`; its whole numbers stand under attributes",
}  # fmt: skip

#: The same where prompts alone are wanted: pairs, rated answers and answers with labels have prompts, too.
ANSWER_FIELDS: dict[str, str] = dict.fromkeys(
    (
        "chosen", "rejected", "chosen_reward", "rejected_reward", "chosen_response", "rejected_response",
        "score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating", "rejected_rating",
        "chosen-rating", "rejected-rating", "chosen_model", "rejected_model", "chosen-model", "rejected-model",
        "response_1", "response_2", "preference_strength", "preference_statement", "preference_elaboration",
        "three_most_similar_preferences", "all_preferences_unprocessed", "completions", "models", "correct_answers",
        "incorrect_answers", "label", "response1", "response2",
        "overall_preference", "individual_preference",
    ),
    "says how the prompt was answered, and the prompt alone is read",
)  # fmt: skip

#: The same of a message.
MESSAGE_FIELDS: dict[str, str] = {
    **dict.fromkeys(("id", "uuid", "message_id", "parent_id"), _NAMES),
    **dict.fromkeys(("timestamp", "created_at", "create_time"), _TIME),
    **dict.fromkeys(("metadata", "language"), _NOTES),
    "model": _AUTHOR,
}


class Unknown:
    """Collects the unknown fields of a record and of its messages."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}

    def account(self, given: Noted, harmless: Mapping[str, str], *, kind: str, place: str = "") -> None:
        """Keep the fields that nobody has read.

        Args:
            given: a record or message, after it was read.
            harmless: field -> why it changes nothing.
            kind: "record" or "message"; the same field of another kind is another fault.
            place: which message, for the fault.
        """
        for name, value in unread(given.left(), harmless=harmless, idle=blank)[0].items():
            self._kinds.setdefault(
                f"{kind} {name}",
                f"{place + ': ' if place else ''}unknown field {name}={shown(value)}, which may say how it is to be "
                "trained on; remove it, or put it under the record's metadata",
            )

    def refuse(self) -> None:
        """Raise :class:`UnknownKinds` if anything was kept."""
        if self._kinds:
            raise UnknownKinds(self._kinds)


def blank(value: Any) -> bool:
    """Whether a field has no value; false and 0 are values."""
    return value is None or (isinstance(value, str | list | dict) and not value)
