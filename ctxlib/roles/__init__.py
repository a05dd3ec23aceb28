"""Exactly one role for every token of any chat template."""

from ctxlib.roles.encoding import encode
from ctxlib.roles.maps import (
    PARTS,
    PLAIN_SEPARATOR,
    ROLES,
    Role,
    RoleBatch,
    RoleMap,
    content_alignment,
    pad_batch,
    question_apart,
    role_map,
    role_table,
)
from ctxlib.roles.rendering import Contents, Rendering, render, spelled_by_template, tokenizer_name

__all__ = [
    "PARTS",
    "PLAIN_SEPARATOR",
    "ROLES",
    "Contents",
    "Rendering",
    "Role",
    "RoleBatch",
    "RoleMap",
    "content_alignment",
    "encode",
    "pad_batch",
    "question_apart",
    "render",
    "role_map",
    "role_table",
    "spelled_by_template",
    "tokenizer_name",
]
