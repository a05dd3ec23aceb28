"""Exactly one role for every token of any chat template."""

from ctxlib.roles.encoding import encode
from ctxlib.roles.maps import (
    PLAIN_SEPARATOR,
    QUESTION_GROUPS,
    ROLES,
    Groups,
    Role,
    RoleBatch,
    RoleMap,
    content_alignment,
    pad_batch,
    pad_groups,
    question_groups,
    role_map,
    role_table,
    split_user,
)
from ctxlib.roles.rendering import Contents, Rendering, render, spelled_by_template, tokenizer_name

__all__ = [
    "PLAIN_SEPARATOR",
    "QUESTION_GROUPS",
    "ROLES",
    "Contents",
    "Groups",
    "Rendering",
    "Role",
    "RoleBatch",
    "RoleMap",
    "content_alignment",
    "encode",
    "pad_batch",
    "pad_groups",
    "question_groups",
    "render",
    "role_map",
    "role_table",
    "spelled_by_template",
    "split_user",
    "tokenizer_name",
]
