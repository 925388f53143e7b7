//! What a Service needs: the rules of `registry/core/service/storage` in Kubernetes.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::{Held, Pools, pool::PoolError};
use crate::{
    registry::value::{int, list, text},
    status::FieldError,
};

const NONE: &str = "None";

/// What a stored Service holds.
pub(super) fn held(service: &Value) -> Held {
    let mut held = Held::default();
    let single = text(service, &["spec", "clusterIP"]);
    let all = list(service, &["spec", "clusterIPs"]).iter().filter_map(Value::as_str);
    held.addresses = all.chain(Some(single)).filter_map(|address| address.parse().ok()).collect();
    let ports =
        list(service, &["spec", "ports"]).iter().filter_map(|port| int(port, &["nodePort"]));
    let health = int(service, &["spec", "healthCheckNodePort"]);
    held.ports = ports
        .chain(health)
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
        .collect();
    held
}

fn service_type(service: &Value) -> &str {
    match text(service, &["spec", "type"]) {
        "" => "ClusterIP",
        other => other,
    }
}

fn needs_address(service: &Value) -> bool {
    service_type(service) != "ExternalName"
}

fn wants_node_ports(service: &Value) -> bool {
    match service_type(service) {
        "NodePort" => true,
        "LoadBalancer" => {
            service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false))
        }
        _ => false,
    }
}

fn may_have_node_ports(service: &Value) -> bool {
    matches!(service_type(service), "NodePort" | "LoadBalancer")
}

fn wants_health_port(service: &Value) -> bool {
    service_type(service) == "LoadBalancer"
        && text(service, &["spec", "externalTrafficPolicy"]) == "Local"
}

fn spec(service: &mut Value) -> Option<&mut Map<String, Value>> {
    service.get_mut("spec")?.as_object_mut()
}

/// Fills in `new`; what was taken for it, and what `old` held and it does not.
pub(super) fn allocate(
    pools: &mut Pools,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<(Held, Held), Vec<FieldError>> {
    let old_held = old.map(held).unwrap_or_default();
    let mut allocation = Allocation { pools, old: &old_held, taken: Held::default() };
    let done = allocation.addresses(new, old).and_then(|()| allocation.node_ports(new, old));
    let taken = allocation.taken;
    if let Err(error) = done {
        pools.release(&taken);
        return Err(vec![error]);
    }
    let new_held = held(new);
    let superseded = Held {
        addresses: old_held.addresses.difference(&new_held.addresses).copied().collect(),
        ports: old_held.ports.difference(&new_held.ports).copied().collect(),
    };
    Ok((taken, superseded))
}

struct Allocation<'a> {
    pools: &'a mut Pools,
    old: &'a Held,
    taken: Held,
}

impl Allocation<'_> {
    fn addresses(&mut self, new: &mut Value, old: Option<&Value>) -> Result<(), FieldError> {
        if !needs_address(new) {
            let old_ip = old.map(|old| text(old, &["spec", "clusterIP"])).unwrap_or_default();
            // What was carried along from when it had an address; a new one is for validation to
            // refuse.
            if old.is_none() || text(new, &["spec", "clusterIP"]) == old_ip {
                for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                    spec(new).map(|spec| spec.remove(field));
                }
            }
            return Ok(());
        }
        carry_addresses(new, old);
        let single = text(new, &["spec", "clusterIP"]).to_owned();
        let mut asked: Vec<String> = list(new, &["spec", "clusterIPs"])
            .iter()
            .filter_map(|ip| ip.as_str().map(str::to_owned))
            .filter(|ip| !ip.is_empty())
            .collect();
        match asked.first_mut() {
            None if !single.is_empty() => asked.push(single),
            // Only the one was changed: the list follows, and validation has its say.
            Some(first) if !single.is_empty() && *first != single => *first = single,
            _ => {}
        }
        let headless = asked.first().is_some_and(|ip| ip == NONE);
        let families = self.families(new, if headless { &[] } else { &asked })?;
        let addresses =
            if headless { vec![NONE.to_owned()] } else { self.take_addresses(&families, &asked)? };
        if let Some(spec) = spec(new) {
            spec.insert("clusterIP".to_owned(), addresses[0].as_str().into());
            spec.insert("clusterIPs".to_owned(), json!(addresses));
            spec.insert("ipFamilies".to_owned(), json!(families));
        }
        Ok(())
    }

    /// Fills in the policy, and says which families the Service has.
    fn families(&self, new: &mut Value, asked: &[String]) -> Result<Vec<&'static str>, FieldError> {
        let configured: Vec<&'static str> =
            self.pools.addresses.iter().map(|pool| family(pool.is_ipv4())).collect();
        let given: Vec<&str> =
            list(new, &["spec", "ipFamilies"]).iter().filter_map(Value::as_str).collect();
        let mut families = Vec::new();
        for (n, given) in given.iter().enumerate() {
            match configured.iter().find(|family| *family == given) {
                Some(family) => families.push(*family),
                None => {
                    return Err(FieldError::invalid(
                        format!("spec.ipFamilies[{n}]"),
                        *given,
                        "not configured on this cluster",
                    ));
                }
            }
        }
        for address in asked.iter().skip(families.len()) {
            let Ok(address) = address.parse::<IpAddr>() else { break };
            families.push(family(address.is_ipv4()));
        }
        let policy = match text(new, &["spec", "ipFamilyPolicy"]) {
            "" if families.len() > 1 => "RequireDualStack",
            "" => "SingleStack",
            given => given,
        }
        .to_owned();
        if policy == "RequireDualStack" && configured.len() < 2 {
            return Err(FieldError::invalid(
                "spec.ipFamilyPolicy",
                policy,
                "this cluster is not configured for dual-stack services",
            ));
        }
        if families.is_empty() {
            families.extend(configured.first());
        }
        if policy == "SingleStack" {
            families.truncate(1);
        } else {
            for family in configured {
                if !families.contains(&family) {
                    families.push(family);
                }
            }
        }
        if let Some(spec) = spec(new) {
            spec.insert("ipFamilyPolicy".to_owned(), policy.into());
        }
        Ok(families)
    }

    fn take_addresses(
        &mut self,
        families: &[&str],
        asked: &[String],
    ) -> Result<Vec<String>, FieldError> {
        let mut addresses = Vec::new();
        for (n, wanted) in families.iter().enumerate() {
            let field = format!("spec.clusterIPs[{n}]");
            let pool = self.pools.addresses.iter_mut().find(|p| family(p.is_ipv4()) == *wanted);
            let Some(pool) = pool else {
                return Err(FieldError::invalid(field, *wanted, "not configured on this cluster"));
            };
            let address = match asked.get(n) {
                Some(text) => {
                    let invalid = |why: String| FieldError::invalid(&field, text.as_str(), why);
                    let address: IpAddr = text
                        .parse()
                        .map_err(|_| invalid("must be a valid IP address".to_owned()))?;
                    if self.old.addresses.contains(&address) {
                        addresses.push(text.clone());
                        continue;
                    }
                    if family(address.is_ipv4()) != *wanted {
                        return Err(invalid(format!(
                            "expected an {wanted} value as indicated by `ipFamilies[{n}]`"
                        )));
                    }
                    pool.take(address)
                        .map_err(|e| invalid(format!("failed to allocate IP {text}: {e}")))?;
                    address
                }
                None => pool.take_any().map_err(|e| full(&field, "a serviceIP", &e))?,
            };
            self.taken.addresses.insert(address);
            addresses.push(address.to_string());
        }
        Ok(addresses)
    }

    fn node_ports(&mut self, new: &mut Value, old: Option<&Value>) -> Result<(), FieldError> {
        let (wants, may) = (wants_node_ports(new), may_have_node_ports(new));
        let wants_health = wants_health_port(new);
        let old_ports: &[Value] = old.map(|old| list(old, &["spec", "ports"])).unwrap_or_default();
        let old_health = old.and_then(|old| int(old, &["spec", "healthCheckNodePort"]));
        let Some(spec) = spec(new) else { return Ok(()) };
        let mut given: Vec<(i64, u16)> = Vec::new();
        for (n, port) in
            spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten().enumerate()
        {
            let field = format!("spec.ports[{n}].nodePort");
            let number = int(port, &["port"]).unwrap_or(0);
            let mut asked = node_port(port);
            let before = old_ports.iter().find(|o| same_port(o, port)).map(node_port).unwrap_or(0);
            if !may {
                // Carried along from when it had node ports.
                if asked != 0 && self.old.ports.contains(&asked) {
                    remove(port, "nodePort");
                }
                continue;
            }
            if asked == 0 && wants {
                asked = before;
            }
            let mine =
                |port: &u16| self.old.ports.contains(port) || self.taken.ports.contains(port);
            let taken = match asked {
                0 if !wants => continue,
                // One port over two protocols gets one node port.
                0 => match given.iter().find(|(other, _)| *other == number) {
                    Some((_, shared)) => *shared,
                    None => {
                        let any = self.pools.ports.take_any();
                        let any = any.map_err(|e| full(&field, "a nodePort", &e))?;
                        self.taken.ports.insert(any);
                        any
                    }
                },
                asked if mine(&asked) => asked,
                asked => {
                    self.take_port(&field, asked)?;
                    asked
                }
            };
            given.push((number, taken));
            if let Some(port) = port.as_object_mut() {
                port.insert("nodePort".to_owned(), taken.into());
            }
        }
        let health = spec.get("healthCheckNodePort").and_then(Value::as_i64).unwrap_or(0);
        if wants_health {
            let field = "spec.healthCheckNodePort";
            let port = match (health, old_health) {
                (0, Some(before)) if before != 0 => before,
                (0, _) => {
                    let any = self.pools.ports.take_any();
                    let any = any.map_err(|e| full(field, "a HealthCheck NodePort", &e))?;
                    self.taken.ports.insert(any);
                    any.into()
                }
                (asked, before) if before == Some(asked) => asked,
                (asked, _) => {
                    let port = u16::try_from(asked).unwrap_or(0);
                    self.take_port(field, port)?;
                    asked
                }
            };
            spec.insert("healthCheckNodePort".to_owned(), port.into());
        } else if old_health.is_some_and(|before| before == health) {
            spec.remove("healthCheckNodePort");
        }
        Ok(())
    }

    fn take_port(&mut self, field: &str, port: u16) -> Result<(), FieldError> {
        self.pools
            .ports
            .take(port)
            .map_err(|error| FieldError::invalid(field, port, error.to_string()))?;
        self.taken.ports.insert(port);
        Ok(())
    }
}

fn family(is_ipv4: bool) -> &'static str {
    if is_ipv4 { "IPv4" } else { "IPv6" }
}

fn full(field: &str, what: &str, error: &PoolError) -> FieldError {
    FieldError::invalid(field, Value::Null, format!("failed to allocate {what}: {error}"))
}

fn node_port(port: &Value) -> u16 {
    int(port, &["nodePort"]).and_then(|port| u16::try_from(port).ok()).unwrap_or(0)
}

fn remove(object: &mut Value, field: &str) {
    object.as_object_mut().map(|object| object.remove(field));
}

fn same_port(a: &Value, b: &Value) -> bool {
    let protocol = |port: &Value| match text(port, &["protocol"]) {
        "" => "TCP".to_owned(),
        other => other.to_owned(),
    };
    int(a, &["port"]) == int(b, &["port"]) && protocol(a) == protocol(b)
}

/// An update that does not mention the addresses keeps them.
fn carry_addresses(new: &mut Value, old: Option<&Value>) {
    let Some(old) = old.filter(|old| needs_address(old)) else { return };
    if !text(new, &["spec", "clusterIP"]).is_empty() {
        return;
    }
    let keep = if list(new, &["spec", "clusterIPs"]).is_empty() {
        ["clusterIP", "clusterIPs"].as_slice()
    } else {
        &[]
    };
    if let Some(spec) = spec(new) {
        for field in keep {
            if let Some(value) = old.pointer(&format!("/spec/{field}")) {
                spec.insert((*field).to_owned(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ServiceAllocator, *};

    fn allocator() -> ServiceAllocator {
        ServiceAllocator::new(&["10.96.0.0/24".parse().unwrap()], 30000..=30100, [])
    }

    fn service(spec: Value) -> Value {
        json!({"metadata": {"name": "s"}, "spec": spec})
    }

    #[test]
    fn a_service_gets_an_address_and_keeps_it() {
        let allocator = allocator();
        let mut new = service(json!({"ports": [{"port": 80}]}));
        allocator.reserve(&mut new, None).unwrap().keep();
        let address = new["spec"]["clusterIP"].as_str().unwrap().to_owned();
        assert_eq!(new["spec"]["clusterIPs"], json!([address]));
        assert_eq!(new["spec"]["ipFamilies"], json!(["IPv4"]));
        assert_eq!(new["spec"]["ipFamilyPolicy"], "SingleStack");
        // An update without it keeps it; another Service can't have it.
        let mut update = service(json!({"ports": [{"port": 81}]}));
        allocator.reserve(&mut update, Some(&new)).unwrap().keep();
        assert_eq!(update["spec"]["clusterIP"], *address);
        let mut thief = service(json!({"clusterIP": address}));
        let error = allocator.reserve(&mut thief, None).unwrap_err();
        assert!(error[0].detail.contains("already allocated"), "{error:?}");
        allocator.release(&update);
        allocator.reserve(&mut thief, None).unwrap().keep();
    }

    #[test]
    fn a_write_that_fails_gives_all_back() {
        let allocator = allocator();
        let fixed = json!({"type": "NodePort", "clusterIP": "10.96.0.10",
                           "ports": [{"port": 80, "nodePort": 30005}]});
        drop(allocator.reserve(&mut service(fixed.clone()), None).unwrap());
        // The second port is outside the range: the first and the address go back at once.
        let mut bad = service(json!({"type": "NodePort", "clusterIP": "10.96.0.10",
                "ports": [{"port": 80, "nodePort": 30005}, {"port": 81, "nodePort": 80}]}));
        assert!(allocator.reserve(&mut bad, None).is_err());
        allocator.reserve(&mut service(fixed), None).unwrap().keep();
    }

    #[test]
    fn headless_and_external_services_need_none() {
        let allocator = allocator();
        let mut headless = service(json!({"clusterIP": "None"}));
        allocator.reserve(&mut headless, None).unwrap().keep();
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
        let mut external = service(json!({"type": "ExternalName", "externalName": "a.example"}));
        allocator.reserve(&mut external, None).unwrap().keep();
        assert!(external["spec"].get("clusterIP").is_none());
    }

    #[test]
    fn node_ports_come_stay_and_go_with_the_type() {
        let allocator = allocator();
        let ports = json!([{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]);
        let mut old = service(json!({"type": "NodePort", "ports": ports}));
        allocator.reserve(&mut old, None).unwrap().keep();
        let port = old["spec"]["ports"][0]["nodePort"].clone();
        assert!(port.is_u64());
        assert_eq!(old["spec"]["ports"][1]["nodePort"], port);
        let mut same = service(json!({"type": "NodePort", "ports": ports}));
        allocator.reserve(&mut same, Some(&old)).unwrap().keep();
        assert_eq!(same["spec"]["ports"], old["spec"]["ports"]);
        let mut plain = same.clone();
        plain["spec"]["type"] = "ClusterIP".into();
        allocator.reserve(&mut plain, Some(&same)).unwrap().keep();
        assert!(plain["spec"]["ports"][0].get("nodePort").is_none());
        let mut other =
            service(json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": port}]}));
        allocator.reserve(&mut other, None).unwrap().keep();
    }

    #[test]
    fn a_family_that_is_not_there_is_refused() {
        let allocator = allocator();
        let mut six = service(json!({"ipFamilies": ["IPv6"]}));
        assert!(allocator.reserve(&mut six, None).is_err());
        let mut dual = service(json!({"ipFamilyPolicy": "RequireDualStack"}));
        assert!(allocator.reserve(&mut dual, None).is_err());
        let mut prefer = service(json!({"ipFamilyPolicy": "PreferDualStack"}));
        allocator.reserve(&mut prefer, None).unwrap().keep();
        assert_eq!(prefer["spec"]["ipFamilies"], json!(["IPv4"]));
        let ranges = ["10.96.0.0/24".parse().unwrap(), "fd00::/112".parse().unwrap()];
        let both = ServiceAllocator::new(&ranges, 30000..=30100, []);
        let mut dual = service(json!({"ipFamilyPolicy": "PreferDualStack"}));
        both.reserve(&mut dual, None).unwrap().keep();
        assert_eq!(dual["spec"]["clusterIPs"].as_array().unwrap().len(), 2);
    }
}
