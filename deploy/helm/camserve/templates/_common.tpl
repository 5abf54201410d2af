{{/* Names, labels and TOML, which the charts camserve and camserve-gateway share. */}}

{{- define "camserve.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* The names of all resources. Pods append up to 17 characters to them, and labels have at most 63. */}}
{{- define "camserve.fullname" -}}
{{- $name := include "camserve.name" . -}}
{{- $release := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $release | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{- define "camserve.selector" -}}
app.kubernetes.io/name: {{ include "camserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "camserve.labels" -}}
{{ include "camserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: camserve
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/*
TOML of a dictionary. Helm's toToml writes integers as floats, such as 50000.0. Strings, numbers and booleans of JSON are
also those of TOML.
*/}}
{{- define "camserve.toml" -}}
{{- range $key, $value := . -}}
{{- $tables := and (kindIs "slice" $value) $value (kindIs "map" (first $value)) -}}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value) $tables) }}
{{ include "camserve.tomlPair" (list $key $value) }}
{{- end -}}
{{- end -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value }}

[{{ $key }}]
{{- range $name, $each := $value }}
{{ include "camserve.tomlPair" (list $name $each) }}
{{- end -}}
{{- else if and (kindIs "slice" $value) $value (kindIs "map" (first $value)) -}}
{{- range $table := $value }}

[[{{ $key }}]]
{{- range $name, $each := $table }}
{{ include "camserve.tomlPair" (list $name $each) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "camserve.tomlPair" -}}
{{- $key := index . 0 -}}
{{ regexMatch "^[A-Za-z0-9_-]+$" $key | ternary $key (toJson $key) }} = {{ include "camserve.tomlValue" (index . 1) }}
{{- end -}}

{{- define "camserve.tomlValue" -}}
{{- if kindIs "map" . -}}
{{- $pairs := list -}}
{{- range $key, $value := . }}{{ $pairs = append $pairs (include "camserve.tomlPair" (list $key $value)) }}{{ end -}}
{ {{- join ", " $pairs -}} }
{{- else if kindIs "slice" . -}}
{{- $values := list -}}
{{- range . }}{{ $values = append $values (include "camserve.tomlValue" .) }}{{ end -}}
[ {{- join ", " $values -}} ]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}
