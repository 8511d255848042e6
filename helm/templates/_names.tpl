{{/* What things are called, and which labels they carry. */}}

{{- define "twinring.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels that select pods. Call with (dict "root" $ "role" ...). */}}
{{- define "twinring.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "twinring.labels" -}}
{{ include "twinring.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "twinring.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "twinring.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "twinring.authSecret" -}}
{{- default (printf "%s-tenants" (include "twinring.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "twinring.raySecret" -}}
{{- default (printf "%s-ray" (include "twinring.fullname" .)) .Values.rayAuth.existingSecret -}}
{{- end -}}

{{- define "twinring.headAddress" -}}
{{ include "twinring.fullname" . }}-head:6379
{{- end -}}

{{/* http or https, as the router's fronts speak. */}}
{{- define "twinring.scheme" -}}
{{- ternary "https" "http" (not (empty .Values.tls.existingSecret)) -}}
{{- end -}}

{{- define "twinring.image" -}}
{{- $image := merge (dict) .values.image .root.Values.image -}}
{{ $image.repository }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}

{{/* A secret's value: as given, as it lies in the cluster, else a new one. Call with (dict "root" "name" "given"). */}}
{{- define "twinring.stableToken" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name -}}
{{- if .given -}}
{{- .given -}}
{{- else if $found -}}
{{- index $found.data "token" | b64dec -}}
{{- else -}}
{{- randAlphaNum 48 -}}
{{- end -}}
{{- end -}}
