"""Object stores: immutable puts, conditional puts, verified gets. No policy lives here.

`open_store` is the one way in; `s3://bucket/prefix` and `file:///folder` are what it opens.
"""

from __future__ import annotations

from appliance.store.base import Store, StoredObject, Upload
from appliance.store.opening import find_folder, open_store

__all__ = ["Store", "StoredObject", "Upload", "find_folder", "open_store"]
