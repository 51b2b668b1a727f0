#!/bin/sh
# What the administrator of the test machine does, as root, with /payload mounted.
cd /payload

echo "/dev/vdb /payload ext4 ro 0 0" >>/etc/fstab

dpkg -i kmsfs.deb

# nginx: its key under an HSM, whose PIN comes as a credential.
mkdir -p /srv/sealed /etc/nginx/tls
cp -r web/sealed /srv/sealed/web
cp web.toml /etc/kmsfs/web.toml
cp web/site.conf /etc/nginx/conf.d/site.conf
rm -rf /var/lib/softhsm/tokens
cp -r tokens /var/lib/softhsm/tokens
cp pin /etc/kmsfs/pin
mkdir -p /etc/systemd/system/kmsfs@web.service.d
cat >/etc/systemd/system/kmsfs@web.service.d/pin.conf <<END
[Service]
LoadCredential=hsm-pin:/etc/kmsfs/pin
END

# PostgreSQL: its key under a KMS, mounted over itself.
mkdir -p /etc/postgresql/tls
cp db/sealed/* /etc/postgresql/tls
cp db.toml /etc/kmsfs/db.toml
cp kms/ca.pem /etc/kmsfs/kms-ca.pem
cp secret-id secret-key /etc/kmsfs
mkdir -p /etc/systemd/system/kmsfs@db.service.d
cat >/etc/systemd/system/kmsfs@db.service.d/credentials.conf <<END
[Service]
LoadCredential=tencentcloud-secret-id:/etc/kmsfs/secret-id
LoadCredential=tencentcloud-secret-key:/etc/kmsfs/secret-key
END
cp db/ssl.conf /etc/postgresql/15/main/conf.d/ssl.conf

# The KMS that PostgreSQL's tree needs.
cp kmsemu /usr/local/bin/kmsemu
cp -r kms /var/lib/kmsemu
cp kmsemu.service /etc/systemd/system

chmod -R go= /etc/kmsfs /var/lib/kmsemu
chmod 644 /etc/nginx/conf.d/site.conf /etc/postgresql/15/main/conf.d/ssl.conf
chmod 755 /etc/nginx/tls /etc/postgresql/tls
systemctl daemon-reload
