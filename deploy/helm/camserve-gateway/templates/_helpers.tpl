{{/* The environment variables. */}}
{{- define "camserve.env" -}}
{{ toYaml .Values.env }}
{{- end -}}

{{/* The configuration file. */}}
{{- define "camserve.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "spool" "/var/lib/camserve-gateway/spool" -}}
{{- $_ := set $config "listen" "0.0.0.0:11112" -}}
{{- $_ := set $config "monitor_listen" "0.0.0.0:11180" -}}
{{- $_ := set $config "monitor_insecure" true -}}
{{- if .Values.tls.secretName -}}
{{- $tls := dict "certificate" "/etc/camserve/tls/tls.crt" "key" "/etc/camserve/tls/tls.key" "ca" "/etc/camserve/tls/ca.crt" -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- include "camserve.toml" $config -}}
{{- end -}}

{{/* Fail if values are missing or contradict each other. values.schema.json checks each value by itself. */}}
{{- define "camserve.validate" -}}
{{- $config := .Values.config -}}
{{- $errors := include "camserve.commonErrors" . | fromJsonArray -}}
{{- if or (not .Values.image.repository) (not .Values.image.tag) -}}
{{- $errors = append $errors "image: set repository and tag to an image built with --build-arg EXTRAS=gateway." -}}
{{- end -}}
{{- if not $config.callers -}}
{{- $errors = append $errors "config.callers: list the AE titles that may send images." -}}
{{- end -}}
{{- if not $config.pacs -}}
{{- $errors = append $errors "config.pacs: set ae_title and address, or stow_url, of the PACS that stores results." -}}
{{- end -}}
{{- if not (dig "server" "address" "" $config) -}}
{{- $errors = append $errors "config.server.address: set it to the camserve server, such as camserve.NAMESPACE.svc:50051." -}}
{{- end -}}
{{- if and (not .Values.tls.secretName) (not $config.insecure) -}}
{{- $errors = append $errors "tls.secretName: set it to a secret with tls.crt, tls.key and ca.crt, or set config.insecure to true if you trust the network." -}}
{{- end -}}
{{- if .Values.networkPolicy.enabled -}}
{{- if not .Values.networkPolicy.senders -}}
{{- $errors = append $errors "networkPolicy.senders: list the peers that send images, such as {ipBlock: {cidr: 10.1.0.0/16}}, or set networkPolicy.enabled to false." -}}
{{- end -}}
{{- if not .Values.networkPolicy.egress -}}
{{- $errors = append $errors "networkPolicy.egress: list rules for the PACS and the camserve server, or set networkPolicy.enabled to false." -}}
{{- end -}}
{{- end -}}
{{- with $errors }}{{ fail (printf "\n- %s" (join "\n- " .)) }}{{ end -}}
{{- end -}}
