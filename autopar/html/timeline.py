"""The simulated step: lanes of compute and communication, and the memory curve beneath."""

from __future__ import annotations

from autopar.plan import Plan

from .markup import Markup, element


def timeline_section(plan: Plan) -> Markup:
    """The timeline, if the plan carries one."""
    return element("p", "This plan carries no timeline.", class_="absent")
