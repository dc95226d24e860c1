"""Ephemeral Yandex Data Proc clusters."""
