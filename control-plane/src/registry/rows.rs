//! The rows of the resources that come with the API server.

use super::{Resource, StorageKey, Strategy, Subresource, kinds};

const ALL: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
/// Namespaces are deleted one at a time.
const NAMESPACE: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const CREATE: &[&str] = &["create"];
const STATUS: &[&str] = &["get", "patch", "update"];

struct Row {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
    in_all: bool,
    namespaced: bool,
    verbs: &'static [&'static str],
    subresources: Vec<Subresource>,
    generation: bool,
    strategy: &'static Strategy,
}

impl Row {
    fn stored(
        group: &'static str,
        kind: &'static str,
        plural: &'static str,
        singular: &'static str,
        strategy: &'static Strategy,
    ) -> Self {
        Self {
            group,
            kind,
            plural,
            singular,
            short_names: &[],
            in_all: false,
            namespaced: true,
            verbs: ALL,
            subresources: Vec::new(),
            generation: false,
            strategy,
        }
    }

    /// A question that is answered and not kept.
    fn review(
        group: &'static str,
        kind: &'static str,
        plural: &'static str,
        singular: &'static str,
    ) -> Self {
        let row = Self::stored(group, kind, plural, singular, &Strategy::PLAIN);
        Self { verbs: CREATE, namespaced: false, ..row }
    }

    fn cluster(self) -> Self {
        Self { namespaced: false, ..self }
    }

    fn short(self, short_names: &'static [&'static str]) -> Self {
        Self { short_names, ..self }
    }

    fn in_all(self) -> Self {
        Self { in_all: true, ..self }
    }

    fn generation(self) -> Self {
        Self { generation: true, ..self }
    }

    fn verbs(self, verbs: &'static [&'static str]) -> Self {
        Self { verbs, ..self }
    }

    fn sub(mut self, name: &'static str, verbs: &'static [&'static str]) -> Self {
        let kind = self.kind;
        self.subresources.push(Subresource { name, group: "", version: "", kind, verbs });
        self
    }

    fn sub_of(
        mut self,
        name: &'static str,
        group: &'static str,
        kind: &'static str,
        verbs: &'static [&'static str],
    ) -> Self {
        self.subresources.push(Subresource { name, group, version: "v1", kind, verbs });
        self
    }

    fn status(self) -> Self {
        self.sub("status", STATUS)
    }

    fn scale(self) -> Self {
        self.sub_of("scale", "autoscaling", "Scale", STATUS)
    }

    fn into_resource(self) -> Resource {
        let texts = |list: &[&str]| list.iter().map(|t| (*t).to_owned()).collect();
        // Events of both groups are one set of objects, kept in the form of the core group.
        let storage_group = if self.plural == "events" { "" } else { self.group };
        Resource {
            group: self.group.to_owned(),
            version: "v1".to_owned(),
            kind: self.kind.to_owned(),
            list_kind: format!("{}List", self.kind),
            plural: self.plural.to_owned(),
            singular: self.singular.to_owned(),
            short_names: texts(self.short_names),
            categories: if self.in_all { texts(&["all"]) } else { Vec::new() },
            namespaced: self.namespaced,
            verbs: self.verbs.to_vec(),
            subresources: self.subresources,
            storage: StorageKey { group: storage_group.to_owned(), plural: self.plural.to_owned() },
            virtual_only: self.verbs == CREATE,
            has_generation: self.generation,
            strategy: self.strategy,
        }
    }
}

pub(super) fn all() -> Vec<Resource> {
    core().into_iter().chain(workloads()).chain(access()).map(Row::into_resource).collect()
}

fn core() -> Vec<Row> {
    let streams: &[&str] = &["create", "get"];
    let proxied: &[&str] = &["create", "delete", "get", "patch", "update"];
    vec![
        Row { namespaced: true, ..Row::review("", "Binding", "bindings", "binding") },
        Row::stored("", "ConfigMap", "configmaps", "configmap", &kinds::config::CONFIG_MAP)
            .short(&["cm"]),
        Row::stored("", "Endpoints", "endpoints", "endpoints", &kinds::endpoints::ENDPOINTS)
            .short(&["ep"]),
        Row::stored("", "Event", "events", "event", &kinds::event::CORE).short(&["ev"]),
        Row::stored("", "Namespace", "namespaces", "namespace", &kinds::namespace::NAMESPACE)
            .cluster()
            .short(&["ns"])
            .verbs(NAMESPACE)
            .sub("finalize", &["update"])
            .status(),
        Row::stored("", "Node", "nodes", "node", &kinds::node::NODE)
            .cluster()
            .short(&["no"])
            .sub_of("proxy", "", "NodeProxyOptions", proxied)
            .status(),
        Row::stored("", "Pod", "pods", "pod", &kinds::pod::POD)
            .short(&["po"])
            .in_all()
            .generation()
            .sub_of("attach", "", "PodAttachOptions", streams)
            .sub_of("binding", "", "Binding", CREATE)
            .sub("ephemeralcontainers", STATUS)
            .sub_of("eviction", "policy", "Eviction", CREATE)
            .sub_of("exec", "", "PodExecOptions", streams)
            .sub("log", &["get"])
            .sub_of("portforward", "", "PodPortForwardOptions", streams)
            .sub_of("proxy", "", "PodProxyOptions", proxied)
            .status(),
        Row::stored("", "Secret", "secrets", "secret", &kinds::config::SECRET),
        Row::stored(
            "",
            "ServiceAccount",
            "serviceaccounts",
            "serviceaccount",
            &kinds::service_account::SERVICE_ACCOUNT,
        )
        .short(&["sa"])
        .sub_of("token", "authentication.k8s.io", "TokenRequest", CREATE),
        Row::stored("", "Service", "services", "service", &kinds::service::SERVICE)
            .short(&["svc"])
            .in_all()
            .sub_of("proxy", "", "ServiceProxyOptions", proxied)
            .status(),
    ]
}

fn workloads() -> Vec<Row> {
    vec![
        Row::stored(
            "apps",
            "Deployment",
            "deployments",
            "deployment",
            &kinds::workload::DEPLOYMENT,
        )
        .short(&["deploy"])
        .in_all()
        .generation()
        .scale()
        .status(),
        Row::stored(
            "apps",
            "ReplicaSet",
            "replicasets",
            "replicaset",
            &kinds::workload::REPLICA_SET,
        )
        .short(&["rs"])
        .in_all()
        .generation()
        .scale()
        .status(),
        Row::stored("coordination.k8s.io", "Lease", "leases", "lease", &kinds::lease::LEASE),
        Row::stored(
            "discovery.k8s.io",
            "EndpointSlice",
            "endpointslices",
            "endpointslice",
            &kinds::endpoints::ENDPOINT_SLICE,
        )
        .generation(),
        Row::stored("events.k8s.io", "Event", "events", "event", &kinds::event::EVENTS)
            .short(&["ev"]),
        Row::stored(
            "scheduling.k8s.io",
            "PriorityClass",
            "priorityclasses",
            "priorityclass",
            &kinds::priority_class::PRIORITY_CLASS,
        )
        .cluster()
        .short(&["pc"]),
    ]
}

fn access() -> Vec<Row> {
    let authn = "authentication.k8s.io";
    let authz = "authorization.k8s.io";
    let rbac = "rbac.authorization.k8s.io";
    let local = Row::review(
        authz,
        "LocalSubjectAccessReview",
        "localsubjectaccessreviews",
        "localsubjectaccessreview",
    );
    vec![
        Row::review(authn, "TokenReview", "tokenreviews", "tokenreview"),
        Row::review(authn, "SelfSubjectReview", "selfsubjectreviews", "selfsubjectreview"),
        Row { namespaced: true, ..local },
        Row::review(
            authz,
            "SelfSubjectAccessReview",
            "selfsubjectaccessreviews",
            "selfsubjectaccessreview",
        ),
        Row::review(
            authz,
            "SelfSubjectRulesReview",
            "selfsubjectrulesreviews",
            "selfsubjectrulesreview",
        ),
        Row::review(authz, "SubjectAccessReview", "subjectaccessreviews", "subjectaccessreview"),
        Row::stored(
            rbac,
            "ClusterRoleBinding",
            "clusterrolebindings",
            "clusterrolebinding",
            &kinds::rbac::CLUSTER_ROLE_BINDING,
        )
        .cluster(),
        Row::stored(rbac, "ClusterRole", "clusterroles", "clusterrole", &kinds::rbac::CLUSTER_ROLE)
            .cluster(),
        Row::stored(rbac, "RoleBinding", "rolebindings", "rolebinding", &kinds::rbac::ROLE_BINDING),
        Row::stored(rbac, "Role", "roles", "role", &kinds::rbac::ROLE),
    ]
}
