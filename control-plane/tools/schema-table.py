#!/usr/bin/env python3
"""Makes src/schema/types.json, the table of API types that the API server knows.

Usage: schema-table.py TYPES.json > src/schema/types.json

TYPES.json maps the name of each definition of Kubernetes' OpenAPI document to its schema, without
descriptions, with {"ref": name} for references, {"values": schema} for maps, and "gvk" on the kinds.
The table made from it has only what can be reached from ROOTS, one type a line:

  "api.core.v1.Container": {"fields": {"name": "string", "env": {"type": "[]api.core.v1.EnvVar",
      "list": ["name"], "patch": "merge", "key": "name"}}, "required": ["name"]}

A type is string, boolean, int32, int64, double, bytes, time, microtime, quantity, int-or-string,
any, the name of another type (without "io.k8s."), []T or {}T. "list" is "set" or the keys of a map
list (lists are atomic otherwise); "atomic" marks maps and structures that are owned as a whole.
"""
import json
import sys

API = "io.k8s.api."
META = "io.k8s.apimachinery.pkg.apis.meta.v1."
ROOTS = [API + name for name in """
apps.v1.Deployment apps.v1.ReplicaSet
authentication.v1.SelfSubjectReview authentication.v1.TokenRequest authentication.v1.TokenReview
authorization.v1.LocalSubjectAccessReview authorization.v1.SelfSubjectAccessReview
authorization.v1.SelfSubjectRulesReview authorization.v1.SubjectAccessReview
autoscaling.v1.Scale coordination.v1.Lease
core.v1.Binding core.v1.ConfigMap core.v1.Endpoints core.v1.Event core.v1.Namespace core.v1.Node
core.v1.Pod core.v1.Secret core.v1.Service core.v1.ServiceAccount
discovery.v1.EndpointSlice events.v1.Event policy.v1.Eviction
rbac.v1.ClusterRole rbac.v1.ClusterRoleBinding rbac.v1.Role rbac.v1.RoleBinding
scheduling.v1.PriorityClass
""".split()] + [META + "DeleteOptions", META + "ListMeta", META + "Status"]

LEAVES = {
    META + "Time": "time",
    META + "MicroTime": "microtime",
    META + "FieldsV1": "any",
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "int-or-string",
    "io.k8s.apimachinery.pkg.runtime.RawExtension": "any",
}


def short(name):
    return name.removeprefix("io.k8s.")


class Table:
    def __init__(self, types):
        self.types = types
        self.out = {}

    def kind(self, schema):
        if "ref" in schema:
            name = schema["ref"]
            if name in LEAVES:
                return LEAVES[name]
            self.add(name)
            return short(name)
        match schema.get("type"):
            case "array":
                return "[]" + self.kind(schema["items"])
            case "object":
                return "{}" + self.kind(schema["values"]) if "values" in schema else "any"
            case "string":
                return {"byte": "bytes"}.get(schema.get("format"), "string")
            case "integer":
                return schema.get("format", "int64")
            case "number":
                return "double"
            case "boolean":
                return "boolean"
            case _:
                return "any"

    def field(self, schema):
        out = {"type": self.kind(schema)}
        match schema.get("x-kubernetes-list-type"):
            case "map":
                out["list"] = schema["x-kubernetes-list-map-keys"]
            case "set":
                out["list"] = "set"
        if schema.get("x-kubernetes-map-type") == "atomic":
            out["atomic"] = True
        if "x-kubernetes-patch-strategy" in schema:
            out["patch"] = schema["x-kubernetes-patch-strategy"]
        if "x-kubernetes-patch-merge-key" in schema:
            out["key"] = schema["x-kubernetes-patch-merge-key"]
        default = schema.get("default")
        if default not in (None, "", 0, {}, []):
            out["default"] = default
        return out["type"] if len(out) == 1 else out

    def add(self, name):
        if short(name) in self.out:
            return
        schema = self.types[name]
        entry = self.out[short(name)] = {}
        if schema.get("x-kubernetes-map-type") == "atomic":
            entry["atomic"] = True
        entry["fields"] = {k: self.field(v) for k, v in sorted(schema.get("properties", {}).items())}
        if schema.get("required"):
            entry["required"] = sorted(schema["required"])


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        table = Table(json.load(file))
    for root in ROOTS:
        table.add(root)
    lines = (f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in sorted(table.out.items()))
    print("{\n" + ",\n".join(lines) + "\n}")


main()
