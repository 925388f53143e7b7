//! Roles and bindings of people and components.

use super::{
    Binding,
    Grant::{self, Api, Named, Url},
    Role,
    Subject::{Group, ServiceAccount, User},
};

const READ: &str = "get list watch";
const WRITE: &str = "create delete deletecollection patch update";
const ALL: &str = "create delete deletecollection get list patch update watch";

const EVENTS: Grant = Api("create patch update", "core events.k8s.io", "events");

/// Who may look, but not at secrets, roles and what runs inside containers.
pub(super) const VIEW: &[Grant] = &[
    Api(
        READ,
        "core",
        "configmaps endpoints persistentvolumeclaims persistentvolumeclaims/status pods \
         replicationcontrollers replicationcontrollers/scale serviceaccounts services services/status",
    ),
    Api(
        READ,
        "core",
        "bindings events limitranges namespaces/status pods/log pods/status \
         replicationcontrollers/status resourcequotas resourcequotas/status",
    ),
    Api(READ, "core", "namespaces"),
    Api(READ, "discovery.k8s.io", "endpointslices"),
    Api(
        READ,
        "apps",
        "controllerrevisions daemonsets daemonsets/status deployments deployments/scale \
         deployments/status replicasets replicasets/scale replicasets/status statefulsets \
         statefulsets/scale statefulsets/status",
    ),
    Api(READ, "autoscaling", "horizontalpodautoscalers horizontalpodautoscalers/status"),
    Api(READ, "batch", "cronjobs cronjobs/status jobs jobs/status"),
    Api(READ, "policy", "poddisruptionbudgets poddisruptionbudgets/status"),
    Api(READ, "networking.k8s.io", "ingresses ingresses/status networkpolicies"),
    Api(READ, "resource.k8s.io", "resourceclaims resourceclaims/status resourceclaimtemplates"),
];

/// Who may change what runs, and read secrets.
pub(super) const EDIT: &[Grant] = &[
    Api(READ, "core", "pods/attach pods/exec pods/portforward pods/proxy secrets services/proxy"),
    Api("impersonate", "core", "serviceaccounts"),
    Api(WRITE, "core", "pods pods/attach pods/exec pods/portforward pods/proxy"),
    Api("create", "core", "pods/eviction"),
    Api(
        WRITE,
        "core",
        "configmaps events persistentvolumeclaims replicationcontrollers \
         replicationcontrollers/scale secrets serviceaccounts services services/proxy",
    ),
    Api("create", "core", "serviceaccounts/token"),
    Api(
        WRITE,
        "apps",
        "daemonsets deployments deployments/rollback deployments/scale replicasets \
         replicasets/scale statefulsets statefulsets/scale",
    ),
    Api(WRITE, "autoscaling", "horizontalpodautoscalers"),
    Api(WRITE, "batch", "cronjobs jobs"),
    Api(WRITE, "policy", "poddisruptionbudgets"),
    Api(WRITE, "networking.k8s.io", "ingresses networkpolicies"),
    Api(WRITE, "resource.k8s.io", "resourceclaims resourceclaimtemplates"),
    Api(ALL, "coordination.k8s.io", "leases"),
];

/// Who may grant within a namespace, too.
pub(super) const ADMIN: &[Grant] = &[
    Api("create", "authorization.k8s.io", "localsubjectaccessreviews"),
    Api(ALL, "rbac.authorization.k8s.io", "rolebindings roles"),
];

pub(super) const CLUSTER_ROLES: &[Role] = &[
    Role { name: "cluster-admin", grants: &[Api("*", "*", "*"), Url("*", "*")] },
    Role {
        name: "system:discovery",
        grants: &[Url(
            "get",
            "/api /api/* /apis /apis/* /healthz /livez /openapi /openapi/* /readyz /version /version/",
        )],
    },
    Role {
        name: "system:monitoring",
        grants: &[Url(
            "get",
            "/healthz /healthz/* /livez /livez/* /metrics /metrics/slis /readyz /readyz/*",
        )],
    },
    Role {
        name: "system:basic-user",
        grants: &[
            Api(
                "create",
                "authorization.k8s.io",
                "selfsubjectaccessreviews selfsubjectrulesreviews",
            ),
            Api("create", "authentication.k8s.io", "selfsubjectreviews"),
        ],
    },
    Role {
        name: "system:public-info-viewer",
        grants: &[Url("get", "/healthz /livez /readyz /version /version/")],
    },
    Role {
        name: "system:service-account-issuer-discovery",
        grants: &[Url(
            "get",
            "/.well-known/openid-configuration /.well-known/openid-configuration/ \
             /openid/v1/jwks /openid/v1/jwks/",
        )],
    },
    // Bound to nobody: the node authorizer grants this per object. For those who turn that off.
    Role {
        name: "system:node",
        grants: &[
            Api("create get patch update", "core", "nodes"),
            Api("patch update", "core", "nodes/status"),
            Api("create delete get", "core", "pods"),
            Api("patch update", "core", "pods/status"),
            Api("create", "core", "pods/eviction"),
            Api(READ, "core", "configmaps secrets"),
            Api("get", "core", "persistentvolumeclaims persistentvolumes serviceaccounts"),
            Api("get patch update", "core", "persistentvolumeclaims/status"),
            Api("create", "core", "serviceaccounts/token"),
            Api("get", "resource.k8s.io", "resourceclaims"),
            Api("get", "storage.k8s.io", "volumeattachments"),
            Api("create delete get patch update", "coordination.k8s.io", "leases"),
            Api("create delete get patch update", "storage.k8s.io", "csinodes"),
        ],
    },
    Role {
        name: "system:node-problem-detector",
        grants: &[Api("get", "core", "nodes"), Api("patch", "core", "nodes/status"), EVENTS],
    },
    Role {
        name: "system:node-proxier",
        grants: &[
            Api("list watch", "core", "endpoints services"),
            Api(READ, "core", "nodes"),
            EVENTS,
            Api("list watch", "discovery.k8s.io", "endpointslices"),
            Api("list watch", "networking.k8s.io", "servicecidrs"),
        ],
    },
    Role {
        name: "system:kubelet-api-admin",
        grants: &[
            Api(READ, "core", "nodes"),
            Api("proxy", "core", "nodes"),
            Api(
                "*",
                "core",
                "nodes/checkpoint nodes/configz nodes/healthz nodes/log nodes/metrics nodes/pods \
                 nodes/proxy nodes/spec nodes/stats",
            ),
        ],
    },
    Role {
        name: "system:node-bootstrapper",
        grants: &[Api(
            "create get list watch",
            "certificates.k8s.io",
            "certificatesigningrequests",
        )],
    },
    Role {
        name: "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
        grants: &[Api("create", "certificates.k8s.io", "certificatesigningrequests/nodeclient")],
    },
    Role {
        name: "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
        grants: &[Api(
            "create",
            "certificates.k8s.io",
            "certificatesigningrequests/selfnodeclient",
        )],
    },
    Role {
        name: "system:auth-delegator",
        grants: &[
            Api("create", "authentication.k8s.io", "tokenreviews"),
            Api("create", "authorization.k8s.io", "subjectaccessreviews"),
        ],
    },
    Role { name: "system:kube-aggregator", grants: &[Api(READ, "core", "endpoints services")] },
    Role {
        name: "system:kube-controller-manager",
        grants: &[
            EVENTS,
            Api("create", "coordination.k8s.io", "leases"),
            Named("get update", "coordination.k8s.io", "leases", "kube-controller-manager"),
            Api("create", "core", "secrets serviceaccounts"),
            Api("delete", "core", "secrets"),
            Api("get", "core", "configmaps namespaces secrets serviceaccounts"),
            Api("update", "core", "secrets serviceaccounts"),
            Api("create", "authentication.k8s.io", "tokenreviews"),
            Api("create", "authorization.k8s.io", "subjectaccessreviews"),
            Api("list watch", "*", "*"),
            Api("create", "core", "serviceaccounts/token"),
        ],
    },
    Role {
        name: "system:kube-scheduler",
        grants: &[
            EVENTS,
            Api("create", "coordination.k8s.io", "leases"),
            Named("get update", "coordination.k8s.io", "leases", "kube-scheduler"),
            Api(READ, "core", "namespaces nodes replicationcontrollers services"),
            Api("delete get list watch", "core", "pods"),
            Api("create", "core", "bindings pods/binding"),
            Api("patch update", "core", "pods/status"),
            Api(READ, "apps", "replicasets statefulsets"),
            Api(READ, "policy", "poddisruptionbudgets"),
            Api(READ, "core", "persistentvolumeclaims persistentvolumes"),
            Api("create", "authentication.k8s.io", "tokenreviews"),
            Api("create", "authorization.k8s.io", "subjectaccessreviews"),
            Api(
                READ,
                "storage.k8s.io",
                "csidrivers csinodes csistoragecapacities storageclasses volumeattachments",
            ),
            Api(READ, "scheduling.k8s.io", "priorityclasses"),
            Api(READ, "resource.k8s.io", "deviceclasses resourceslices"),
            Api("get list patch update watch", "resource.k8s.io", "resourceclaims"),
            Api("patch update", "resource.k8s.io", "resourceclaims/status"),
        ],
    },
    Role {
        name: "system:volume-scheduler",
        grants: &[
            Api("get list patch update watch", "core", "persistentvolumes"),
            Api(READ, "storage.k8s.io", "storageclasses"),
            Api("get list patch update watch", "core", "persistentvolumeclaims"),
        ],
    },
    // The cluster's DNS server also answers for pods, and needs to know which namespaces there are.
    Role {
        name: "system:kube-dns",
        grants: &[
            Api("list watch", "core", "endpoints namespaces pods services"),
            Api("list watch", "discovery.k8s.io", "endpointslices"),
        ],
    },
    Role {
        name: "system:persistent-volume-provisioner",
        grants: &[
            Api("create delete get list watch", "core", "persistentvolumes"),
            Api("get list update watch", "core", "persistentvolumeclaims"),
            Api(READ, "storage.k8s.io", "storageclasses"),
            Api("watch", "core", "events"),
            EVENTS,
        ],
    },
];

pub(super) const CLUSTER_ROLE_BINDINGS: &[Binding] = &[
    Binding { name: "cluster-admin", role: "cluster-admin", subjects: &[Group("system:masters")] },
    Binding {
        name: "system:monitoring",
        role: "system:monitoring",
        subjects: &[Group("system:monitoring")],
    },
    Binding {
        name: "system:discovery",
        role: "system:discovery",
        subjects: &[Group("system:authenticated")],
    },
    Binding {
        name: "system:basic-user",
        role: "system:basic-user",
        subjects: &[Group("system:authenticated")],
    },
    Binding {
        name: "system:public-info-viewer",
        role: "system:public-info-viewer",
        subjects: &[Group("system:authenticated"), Group("system:unauthenticated")],
    },
    Binding {
        name: "system:service-account-issuer-discovery",
        role: "system:service-account-issuer-discovery",
        subjects: &[Group("system:serviceaccounts")],
    },
    Binding { name: "system:node", role: "system:node", subjects: &[] },
    Binding {
        name: "system:node-proxier",
        role: "system:node-proxier",
        subjects: &[User("system:kube-proxy")],
    },
    Binding {
        name: "system:kube-controller-manager",
        role: "system:kube-controller-manager",
        subjects: &[User("system:kube-controller-manager")],
    },
    Binding {
        name: "system:kube-scheduler",
        role: "system:kube-scheduler",
        subjects: &[User("system:kube-scheduler")],
    },
    Binding {
        name: "system:volume-scheduler",
        role: "system:volume-scheduler",
        subjects: &[User("system:kube-scheduler")],
    },
    Binding {
        name: "system:kube-dns",
        role: "system:kube-dns",
        subjects: &[ServiceAccount("kube-dns")],
    },
];

pub(super) const KUBE_SYSTEM_ROLES: &[Role] = &[
    // Cluster DNS publishes its own address, where others have an administrator apply a manifest.
    Role {
        name: "system:kube-dns",
        grants: &[
            Api("create", "core discovery.k8s.io", "endpointslices services"),
            Named("get patch update", "core", "services", "kube-dns"),
            Api("get patch update", "discovery.k8s.io", "endpointslices"),
        ],
    },
    Role {
        name: "extension-apiserver-authentication-reader",
        grants: &[Named(READ, "core", "configmaps", "extension-apiserver-authentication")],
    },
    Role {
        name: "system::leader-locking-kube-controller-manager",
        grants: &[
            Api("watch", "core", "configmaps"),
            Named("get update", "core", "configmaps", "kube-controller-manager"),
        ],
    },
    Role {
        name: "system::leader-locking-kube-scheduler",
        grants: &[
            Api("watch", "core", "configmaps"),
            Named("get update", "core", "configmaps", "kube-scheduler"),
        ],
    },
];

pub(super) const KUBE_SYSTEM_ROLE_BINDINGS: &[Binding] = &[
    Binding {
        name: "system:kube-dns",
        role: "system:kube-dns",
        subjects: &[ServiceAccount("kube-dns")],
    },
    Binding {
        name: "system::extension-apiserver-authentication-reader",
        role: "extension-apiserver-authentication-reader",
        subjects: &[User("system:kube-controller-manager"), User("system:kube-scheduler")],
    },
    Binding {
        name: "system::leader-locking-kube-controller-manager",
        role: "system::leader-locking-kube-controller-manager",
        subjects: &[User("system:kube-controller-manager")],
    },
    Binding {
        name: "system::leader-locking-kube-scheduler",
        role: "system::leader-locking-kube-scheduler",
        subjects: &[User("system:kube-scheduler")],
    },
];
