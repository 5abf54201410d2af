{{- define "camserve.image" -}}
{{- $tag := printf "v%s-%s" .Chart.AppVersion (.Values.gpu.enabled | ternary "cuda" "cpu") -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default $tag) -}}
{{- end -}}

{{/* The environment variables. */}}
{{- define "camserve.env" -}}
# The image's default is a loopback address, which the kubelet cannot reach.
- name: CAMSERVE_HEALTH_LISTEN
  value: 0.0.0.0:50052
- name: CAMSERVE_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
# The server creates the folder, because others can write to the root of a volume.
- name: CAMSERVE_CACHE_DIR
  value: /cache/camserve
{{- if .Values.gpu.enabled }}
- name: CAMSERVE_DEVICE
  value: {{ gt (int .Values.gpu.count) 1 | ternary "all" "cuda" }}
{{- end }}
{{- with .Values.tokens.secretName }}
- name: CAMSERVE_TOKENS
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.tokens.secretKey | quote }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The configuration file. */}}
{{- define "camserve.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if .Values.metrics.enabled }}{{ $_ := set $config "metrics_listen" "0.0.0.0:9464" }}{{ end -}}
{{- if or .Values.metrics.enabled (not .Values.tls.enabled) }}{{ $_ := set $config "insecure" true }}{{ end -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "certificate" "/etc/camserve/tls/tls.crt" "key" "/etc/camserve/tls/tls.key" -}}
{{- if .Values.tls.clientCertificates }}{{ $_ := set $tls "client_ca" "/etc/camserve/tls/ca.crt" }}{{ end -}}
{{- with .Values.tls.allowedSubjects }}{{ $_ := set $tls "allowed_subjects" . }}{{ end -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- with .Values.tokens.list }}{{ $_ := set $config "tokens" . }}{{ end -}}
{{- $_ := set $config "models" .Values.models -}}
{{- include "camserve.toml" $config -}}
{{- end -}}

{{/* Fail if values contradict each other. values.schema.json checks each value by itself. */}}
{{- define "camserve.validate" -}}
{{- $errors := include "camserve.commonErrors" . | fromJsonArray -}}
{{- if and .Values.tokens.list .Values.tokens.secretName -}}
{{- $errors = append $errors "tokens: expected either list or secretName; found both. Remove one." -}}
{{- end -}}
{{- if and (or .Values.tokens.list .Values.tokens.secretName) (not .Values.tls.enabled) -}}
{{- $errors = append $errors "tokens: they need TLS, because anyone on the network could read them. Set tls.enabled to true." -}}
{{- end -}}
{{- if and .Values.tls.allowedSubjects (not .Values.tls.clientCertificates) -}}
{{- $errors = append $errors "tls.allowedSubjects: it needs certificates of callers. Set tls.clientCertificates to true." -}}
{{- end -}}
{{- if and .Values.autoscaling.type (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- $errors = append $errors (printf "autoscaling.minReplicas: %d is greater than maxReplicas, %d." (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .Values.autoscaling.type (not .Values.metrics.enabled) -}}
{{- $errors = append $errors "autoscaling.type: autoscaling needs the metric camserve_queue_rows. Set metrics.enabled to true." -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.type "keda") (not .Values.autoscaling.keda.prometheus) -}}
{{- $errors = append $errors "autoscaling.keda.prometheus: set the URL of Prometheus, such as http://prometheus-operated.monitoring.svc:9090." -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.enabled) -}}
{{- $errors = append $errors "metrics.serviceMonitor.enabled: set metrics.enabled to true." -}}
{{- end -}}
{{- $update := .Values.rollingUpdate -}}
{{- $none := list "0" "0%" -}}
{{- if and $update (has (toString $update.maxUnavailable) $none) (has (toString $update.maxSurge) $none) -}}
{{- $errors = append $errors "rollingUpdate: maxUnavailable and maxSurge cannot both be 0." -}}
{{- end -}}
{{- $volumes := list -}}
{{- range .Values.modelVolumes -}}
{{- if has .name $volumes }}{{ $errors = append $errors (printf "modelVolumes: two of them have the name %q." .name) }}{{ end -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- $models := list -}}
{{- range .Values.models -}}
{{- if has .name $models }}{{ $errors = append $errors (printf "models: two of them have the name %q." .name) }}{{ end -}}
{{- $models = append $models .name -}}
{{- end -}}
{{- with $errors }}{{ fail (printf "\n- %s" (join "\n- " .)) }}{{ end -}}
{{- end -}}
