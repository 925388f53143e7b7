# Making a virtual machine of what this one has, and running it. Sourced by the scripts beside it.
#
# The guest is Debian's cloud kernel, a root file system with the programs it is given and their
# libraries, and nothing of the network. It runs without KVM (on any machine, also in a virtual
# one), prints to its serial console, and powers off by itself.

# Where the kernel is kept between runs.
vm_cache=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/target/vm
# Everything else; removed at the end.
vm_dir=$(mktemp -d)
vm_root=$vm_dir/root
trap 'rm -rf "$vm_dir"' EXIT

vm_fail() {
  echo "tests/vm: $*" >&2
  exit 1
}

# Sets vm_kernel to the folder of an unpacked kernel package, fetched once. The package is not
# installed: the machine's own kernel stays as it is.
vm_get_kernel() {
  local package meta=linux-image-cloud-amd64
  mkdir -p "$vm_cache"
  vm_kernel=$(find "$vm_cache" -mindepth 1 -maxdepth 1 -type d -name 'linux-image-*' | sort -V | tail -n 1)
  [ -z "$vm_kernel" ] || return 0
  package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
  [ -n "$package" ] || vm_fail "apt-get knows no package $meta: run tools/prepare test"
  (
    cd "$vm_dir"
    apt-get -o APT::Sandbox::User=root -q download "$package" >&2 ||
      { apt-get -q update >&2 && apt-get -o APT::Sandbox::User=root -q download "$package" >&2; }
    dpkg -x ./*.deb unpacked
    rm ./*.deb
    # Kept in one step: a run that is interrupted leaves no half of it.
    mv -T unpacked "$vm_cache/$package" 2>/dev/null || [ -d "$vm_cache/$package" ]
  ) || vm_fail "the kernel package $package can't be had"
  vm_kernel=$vm_cache/$package
}

# Makes an empty root file system at vm_root, with busybox's programs.
vm_new_root() {
  local folder
  for folder in usr/bin usr/lib usr/lib64 usr/sbin dev proc sys run tmp root etc var/lib var/log; do
    mkdir -p "$vm_root/$folder"
  done
  for folder in bin lib lib64 sbin; do ln -s "usr/$folder" "$vm_root/$folder"; done
  ln -s ../run "$vm_root/var/run"
  chmod 1777 "$vm_root/tmp"
  echo 'root:x:0:0:root:/root:/bin/sh' >"$vm_root/etc/passwd"
  echo 'root:x:0:' >"$vm_root/etc/group"
  echo 'keelson-vm' >"$vm_root/etc/hostname"
  echo '127.0.0.1 localhost keelson-vm' >"$vm_root/etc/hosts"
  echo 'nameserver 192.0.2.254' >"$vm_root/etc/resolv.conf"
  cp /bin/busybox "$vm_root/usr/bin/busybox"
  for folder in $(/bin/busybox --list-full); do
    folder=${folder#usr/}
    [ -e "$vm_root/usr/$folder" ] || ln -s /usr/bin/busybox "$vm_root/usr/$folder"
  done
}

# Copies programs and the libraries they load to the same places in the guest's root. A name
# without a folder is looked for in PATH.
vm_put_programs() {
  local program path
  for program in "$@"; do
    path=$(PATH="$PATH:/usr/sbin:/sbin" command -v "$program") || vm_fail "$program is missing: run tools/prepare test"
    vm_put_file "$path" "$path"
    vm_put_libraries "$path"
  done
}

# Copies the libraries that a program loads.
vm_put_libraries() {
  local library
  for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
    [ -e "$vm_root/$library" ] || vm_put_file "$library" "$library"
  done
}

# vm_put_file <file> <place in the guest>
vm_put_file() {
  mkdir -p "$vm_root/$(dirname "$2")"
  # In the place of a link to busybox, not through it.
  cp --remove-destination -L "$1" "$vm_root/$2"
}

# Copies a program without what only a debugger reads: there is less to put on the guest's disk.
# vm_put_stripped <file> <place in the guest>
vm_put_stripped() {
  mkdir -p "$vm_root/$(dirname "$2")"
  strip --strip-debug -o "$vm_root/$2" "$1"
  chmod 755 "$vm_root/$2"
}

# Puts the kernel's modules for networks, packet filter and overlay mounts in the guest's root.
vm_put_modules() {
  local modules part
  modules=$(echo "$vm_kernel"/lib/modules/*)
  mkdir -p "$vm_root/usr/lib/modules/$(basename "$modules")/kernel"
  for part in net lib crypto fs/overlayfs fs/fuse fs/autofs drivers/net drivers/virtio drivers/block; do
    mkdir -p "$vm_root/usr/lib/modules/$(basename "$modules")/kernel/$(dirname "$part")"
    cp -r "$modules/kernel/$part" "$vm_root/usr/lib/modules/$(basename "$modules")/kernel/$part"
  done
  cp "$modules"/modules.* "$vm_root/usr/lib/modules/$(basename "$modules")/"
  vm_put_programs modprobe kmod
  # Modules left out are named in modules.order.
  PATH="$PATH:/usr/sbin:/sbin" depmod -b "$vm_root/usr" "$(basename "$modules")" 2>/dev/null ||
    PATH="$PATH:/usr/sbin:/sbin" depmod -b "$vm_root" "$(basename "$modules")"
}

# A first root in memory, which loads the disk's driver and goes on from the disk.
vm_write_initramfs() {
  local first=$vm_dir/first modules number=10 name
  modules=$(echo "$vm_root"/usr/lib/modules/*)
  mkdir -p "$first/dev" "$first/proc" "$first/disk" "$first/modules"
  cp /bin/busybox "$first/busybox"
  # In the order in which they need each other: modprobe knows it.
  for name in virtio_pci virtio_blk; do
    PATH="$PATH:/usr/sbin:/sbin" modprobe -d "$vm_root" -S "$(basename "$modules")" --show-depends "$name"
  done >"$vm_dir/needed"
  while read -r _ name _; do
    [ -n "$(find "$first/modules" -name "*-$(basename "$name")")" ] || cp "$name" "$first/modules/$((number += 1))-$(basename "$name")"
  done < <(grep ^insmod "$vm_dir/needed")
  cp "$(dirname "${BASH_SOURCE[0]}")/guest/init" "$first/init"
  chmod 755 "$first/init"
  (cd "$first" && find . | cpio --quiet -o -H newc) >"$vm_dir/initramfs"
}

# Boots vm_root with `init` as its first process and shows its console, at most for `deadline`
# seconds. Succeeds if the guest said that all went well.
# vm_boot <init> <deadline>
vm_boot() {
  local console=$vm_dir/console begun=$SECONDS
  vm_write_initramfs
  # Sparse: it takes up what is in it.
  truncate -s 4G "$vm_dir/disk"
  PATH="$PATH:/usr/sbin:/sbin" mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 -d "$vm_root" "$vm_dir/disk"
  rm -rf "$vm_root"
  echo "tests/vm: booting $(basename "$vm_kernel") in a virtual machine"
  timeout --kill-after=5 "$2" qemu-system-x86_64 \
    -nodefaults -no-user-config -no-reboot -display none -serial stdio -monitor none \
    -machine pc -accel tcg,thread=multi -cpu max -smp 2 -m 1536 \
    -kernel "$vm_kernel"/boot/vmlinuz-* -initrd "$vm_dir/initramfs" \
    -drive "file=$vm_dir/disk,format=raw,if=virtio,cache=unsafe" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=false init=$1" \
    </dev/null 2>&1 | tr -d '\r' | tee "$console" || true
  echo "tests/vm: the virtual machine was up for $((SECONDS - begun)) s"
  grep -qx 'KEELSON-VM: all is well' "$console" || vm_fail "the guest did not say that all is well within $2 s"
}

# Puts iptables' programs and what they load at run time in the guest's root.
vm_put_iptables() {
  local program extensions
  for program in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    vm_put_programs "$program"
  done
  extensions=$(dpkg -L iptables | grep '/xtables$') || vm_fail "iptables has no extensions here"
  mkdir -p "$vm_root/$extensions"
  cp "$extensions"/lib*.so "$vm_root/$extensions/"
}

# Puts systemd in the guest's root, as this machine has it, with what its programs load.
vm_put_systemd() {
  local file
  while read -r file; do
    [ -f "$file" ] || [ -L "$file" ] || continue
    mkdir -p "$vm_root/$(dirname "$file")"
    cp --remove-destination -P "$file" "$vm_root/$file"
    # Programs start with 0x7f ELF; the rest is units and settings.
    if [ ! -L "$file" ] && [ -x "$file" ] && [ "$(head -c 4 "$file")" = $'\177ELF' ]; then
      vm_put_libraries "$file"
    fi
  done < <(dpkg -L systemd | grep -vE '^/usr/share|^/usr/lib/(kernel|udev)|generator')
  # A machine that has been up before: nothing is asked for.
  echo 0123456789abcdef0123456789abcdef >"$vm_root/etc/machine-id"
  mkdir -p "$vm_root/etc/systemd/system"
  ln -s /lib/systemd/system/multi-user.target "$vm_root/etc/systemd/system/default.target"
}
