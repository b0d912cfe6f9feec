"""srt/disaggregation/utils.py"""

from __future__ import annotations

FAKE_BOOTSTRAP_HOST = "2.2.2.2"
