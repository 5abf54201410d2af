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

{{/* Problems with values of both charts, as a JSON list. */}}
{{- define "camserve.commonErrors" -}}
{{- $errors := list -}}
{{- $fullname := include "camserve.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname) -}}
{{- $errors = append $errors (printf "fullnameOverride: the resources would have the name %q, which Kubernetes refuses for services; expected lower-case letters, digits and hyphens, with a letter first. Set fullnameOverride, or choose another name for the release." $fullname) -}}
{{- end -}}
{{- $variables := list -}}
{{- range include "camserve.env" . | fromYamlArray -}}
{{- if has .name $variables -}}
{{- $errors = append $errors (printf "env: %s is there twice, or the chart sets it. Remove it from env." .name) -}}
{{- end -}}
{{- $variables = append $variables .name -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{- define "camserve.selector" -}}
app.kubernetes.io/name: {{ include "camserve.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
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
also those of TOML, which has no null: a key with null is omitted.
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
{{- include "camserve.tomlPairs" $value -}}
{{- else if and (kindIs "slice" $value) $value (kindIs "map" (first $value)) -}}
{{- range $table := $value }}

[[{{ $key }}]]
{{- include "camserve.tomlPairs" $table -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "camserve.tomlPairs" -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) }}
{{ include "camserve.tomlPair" (list $key $value) }}
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
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) }}{{ $pairs = append $pairs (include "camserve.tomlPair" (list $key $value)) }}{{ end -}}
{{- end -}}
{ {{- join ", " $pairs -}} }
{{- else if kindIs "slice" . -}}
{{- $values := list -}}
{{- range . }}{{ $values = append $values (include "camserve.tomlValue" .) }}{{ end -}}
[ {{- join ", " $values -}} ]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}
