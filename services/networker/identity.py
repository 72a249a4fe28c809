"""Which app a container belongs to: the policy group under which policies name it.

Garden says it in `metadata.policy_group_id` (contract/cell.md 1.6: properties become the key `metadata` of each
plugin's configuration). Other runtimes pass no labels to a plugin, so there CNI_ARGS (`SILKBUS_APP=…`, one container)
or the key `app` of the plugin's configuration (one network for each app) says it. A container without one is attached
and has no policies: nothing on the overlay may reach it.
"""

from collections.abc import Mapping
from typing import Any

from bus.decode import Fields
from bus.messages import MAX_APP_ID, AppId

ARGUMENT = "SILKBUS_APP"


def app_of(config: Mapping[str, Any], arguments: Mapping[str, str]) -> AppId | None:
    """The app, from the first place that names one. Raises Malformed where it is not a text of 1 to 255 characters."""
    fields = Fields(config, "network configuration")
    if "metadata" in fields:
        metadata = Fields(fields.mapping("metadata"), "network configuration: metadata")
        if "policy_group_id" in metadata:
            return AppId(metadata.text("policy_group_id", max_length=MAX_APP_ID))
    if ARGUMENT in arguments:
        return AppId(Fields(arguments, "CNI_ARGS").text(ARGUMENT, max_length=MAX_APP_ID))
    app = fields.optional_text("app", max_length=MAX_APP_ID)
    return None if app is None else AppId(app)
