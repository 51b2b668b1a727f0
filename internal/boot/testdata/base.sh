#!/bin/sh
# Makes what every run starts from, in the current directory: disk.ext4, a Debian 12
# with the servers and nothing of ours; vmlinuz, its stock kernel; and modules/, those
# the kernel needs to find the disk, numbered in loading order.
set -eu

debootstrap --variant=minbase \
	--include=systemd,systemd-sysv,dbus,udev,kmod,procps,curl,openssl,nginx-light,postgresql,softhsm2 \
	bookworm root http://deb.debian.org/debian

# The kernel is unpacked and not installed: the host loads it, and makes the initrd.
image=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/{print $2; exit}')
apt-get -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$image"
dpkg-deb -x linux-image-*.deb kernel
cp kernel/boot/vmlinuz-* vmlinuz
version=$(ls kernel/lib/modules)
lib=lib/modules/$version
mkdir -p "root/$lib/kernel/drivers" modules
cp kernel/$lib/modules.* "root/$lib"
cp -a kernel/$lib/kernel/fs kernel/$lib/kernel/lib kernel/$lib/kernel/crypto "root/$lib/kernel"
cp -a kernel/$lib/kernel/drivers/virtio kernel/$lib/kernel/drivers/block kernel/$lib/kernel/drivers/char "root/$lib/kernel/drivers"
chroot root depmod -a "$version"

n=10
for m in drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev drivers/virtio/virtio_pci_modern_dev \
	drivers/virtio/virtio_pci drivers/block/virtio_blk crypto/crc32c_generic lib/crc16 fs/mbcache fs/jbd2/jbd2 fs/ext4/ext4; do
	cp "kernel/$lib/kernel/$m.ko" "modules/$n-${m##*/}.ko"
	n=$((n + 1))
done

# A machine of its own: no identity yet, a journal that outlives a reboot, no network to wait for.
: >root/etc/machine-id
echo debian >root/etc/hostname
echo '127.0.0.1 localhost debian' >root/etc/hosts
mkdir -p root/var/log/journal
rm -rf root/var/cache/apt/archives/*.deb root/var/lib/apt/lists/*

mke2fs -q -t ext4 -d root -L root disk.ext4 3G
rm -rf root kernel linux-image-*.deb
