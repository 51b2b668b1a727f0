#!/bin/sh
exec 9</srv/shop/password
touch /run/app/started
while sleep 0.05; do
	cat /srv/shop/password >/run/app/read 2>/run/app/why || echo "$(date +%T) $(cat /run/app/why)" >>/run/app/errors
done
